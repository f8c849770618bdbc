"""The part of SLO-Guard that runs beside vLLM: it tunes, judges and promotes. It never imports vLLM or torch."""
