"""How many requests the verdict on a p99 needs: a sequential test of the share of requests over each limit. Pure.

A p99 within its limit allows 1 % of the requests over it. For each limit, with ``x`` = 1 for a request over it and 0
otherwise, the likelihood ratio of 2 % against 0.5 % (twice and half of what is allowed) is

    ratio = product over the requests of (2 % / 0.5 %) ** x * (98 % / 99.5 %) ** (1 - x)

Above 1 / alpha the limit is missed, and the load is stopped. Below alpha for every limit the load has shown enough: no
more requests are sent, and the verdict is that of the sample. The ratio is a supermartingale if at most 0.5 % are over
the limit, and its inverse if 2 % or more are, so that either crosses 1 / alpha with probability at most alpha, whatever
the number of interim analyses (Ville 1939; the ratio is Wald's of 1945). So, with alpha = 1 - confidence: if 0.5 % or
less are over a limit, it is called missed with probability at most alpha; if 2 % or more are, the load ends as
sufficient with probability at most alpha. In between either may happen. At 98 %, 258 requests without a miss suffice.

- ITL: ``x`` is the share of a request's gaps over the limit. By convexity the inequality holds for any ``x`` in [0, 1];
  all requests have equal weight, whatever their lengths.
- Failures: twice and half of ``error_rate``; if none is allowed, arithmetic has ended the load before.
- Only requests that arrived before the first unfinished one count, because fast ones finish first.
- The test assumes that misses are independent. Bursts of misses make it overconfident; the minimum number of requests
  in sidecar.measure.early_stop mitigates the worst of that, not all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from sidecar.config.slo import Slo
from sidecar.measure.partial_load import Arrival, EarlyStop, gaps_of, least_p99_ms, lower_bounds
from sidecar.measure.requests import End, Ending

_ALLOWED = 0.01
_FACTOR = 2.0


@dataclass(frozen=True)
class _Sample:
    """One limit: the requests' ``x``, the allowed share, and, for a p99, a lower bound on it among them, in ms."""

    name: str
    misses: list[float]
    allowed: float = _ALLOWED
    p99_ms: float | None = None


def sequential_ending(sent: Sequence[Arrival], now_s: float, slo: Slo, confidence: float) -> Ending | None:
    """How the load should end, if it has shown enough; ``sent`` by arrival."""
    enough = -math.log(1 - confidence)
    samples = _samples(sent, slo)
    for sample in samples:
        if log_ratio(sample.misses, sample.allowed) >= enough:
            missed = _missed(sample, sent, now_s, slo, confidence)
            if missed is not None:
                return missed
    covered = {sample.name for sample in samples}
    if not all(limit.name in covered for limit in slo.latency_limits):
        return None  # a limit that is not tested here may still be missed
    if all(log_ratio(sample.misses, sample.allowed) <= -enough for sample in samples):
        fewest = min(len(sample.misses) for sample in samples)
        return Ending(End.ENOUGH, f"{fewest} requests show every limit met, at confidence {confidence:.0%}")
    return None


def log_ratio(misses: Sequence[float], allowed: float) -> float:
    """Log likelihood ratio of twice against half of the ``allowed`` share."""
    high, low = min(_FACTOR * allowed, (1 + allowed) / 2), allowed / _FACTOR
    over = math.fsum(misses)
    return over * math.log(high / low) + (len(misses) - over) * math.log((1 - high) / (1 - low))


def _samples(sent: Sequence[Arrival], slo: Slo) -> list[_Sample]:
    ended = list(takewhile(lambda a: a.ended, sent))
    found: list[_Sample] = []
    if slo.ttft_p99_ms is not None:
        found.append(_of_times("ttft_p99_ms", [(a.ttft_s, a.begun) for a in sent], slo.ttft_p99_ms))
    if slo.e2e_p99_ms is not None:
        found.append(_of_times("e2e_p99_ms", [(a.e2e_s, a.ended) for a in sent], slo.e2e_p99_ms))
    if (limit_ms := slo.itl_p99_ms) is not None:
        good = [a.itls_s for a in ended if len(a.itls_s)]
        shares = [float(np.mean(np.asarray(itls_s) * 1000 > limit_ms)) for itls_s in good]
        gaps = gaps_of(ended)
        found.append(_Sample("itl_p99_ms", shares, p99_ms=least_p99_ms(gaps, len(gaps))))
    if slo.error_rate > 0:
        found.append(_Sample("error_rate", [float(a.failed) for a in ended], slo.error_rate))
    return found


def _of_times(name: str, times_s: list[tuple[float, bool]], limit_ms: float) -> _Sample:
    """Latencies, each with whether it is final: one already over the limit is conclusive even if not final."""
    known = [time_s for time_s, _ in takewhile(lambda time: time[1] or time[0] * 1000 > limit_ms, times_s)]
    over = [float(time_s * 1000 > limit_ms) for time_s in known]
    return _Sample(name, over, p99_ms=least_p99_ms(known, len(known)))


def _missed(sample: _Sample, sent: Sequence[Arrival], now_s: float, slo: Slo, confidence: float) -> EarlyStop | None:
    """The end for one limit; None if the sample's own p99 met it, which is possible with unequal lengths."""
    count, over = len(sample.misses), sum(sample.misses)
    sure = f"more than {sample.allowed:.2g} of all at confidence {confidence:.0%}"
    if sample.name == "error_rate":
        bounds = lower_bounds(sent, now_s, count, {}, round(over))
        return EarlyStop(End.STOP, f"{over:.0f} of {count} requests failed: {sure}", bounds)
    limit_ms = float(getattr(slo, sample.name))
    if sample.p99_ms is None or sample.p99_ms <= limit_ms:
        return None
    what = "times between tokens, by requests," if sample.name == "itl_p99_ms" else "requests"
    why = f"{over:.3g} of {count} {what} were over {sample.name} {limit_ms:g}: {sure}"
    return EarlyStop(End.STOP, why, lower_bounds(sent, now_s, count, {sample.name: sample.p99_ms}))
