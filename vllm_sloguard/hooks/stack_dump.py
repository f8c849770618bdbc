"""Where every thread of a process is, written to its log when it is asked: what hangs can't say so by itself."""

import faulthandler
import signal

# vLLM 0.26 to 0.32 has no use for it.
ASKS = signal.SIGUSR2


def show_when_asked() -> None:
    """From now on ``ASKS`` writes the stacks of all threads to standard error. Raises where that is closed."""
    faulthandler.register(ASKS, all_threads=True)
