"""How many requests a verdict needs: a sequential test of the share of requests over each limit. Pure.

A percentile within its limit allows a share ``a`` of the requests over it: 1 % for a p99, 10 % for a p90. For each
limit, with ``x`` = 1 for a request over it and 0 otherwise, the likelihood ratio of ``2 a`` against ``a / 2`` (for a
p99, 2 % against 0.5 %) is

    ratio = product over the requests of (2 % / 0.5 %) ** x * (98 % / 99.5 %) ** (1 - x)

Above 1 / alpha the limit is missed, and the load is stopped. Below alpha for every limit the load has shown enough: no
more requests are sent, and the verdict is that of the sample. The ratio is a supermartingale if at most ``a / 2`` are
over the limit, and its inverse if ``2 a`` or more are, so that either crosses 1 / alpha with probability at most alpha,
whatever the number of interim analyses (Ville 1939; the ratio is Wald's of 1945). So, with alpha = 1 - confidence: if
``a / 2`` or less are over a limit, it is called missed with probability at most alpha; if ``2 a`` or more are, the load
ends as sufficient with probability at most alpha. In between either may happen. At 98 %, 258 requests without a miss
suffice for a p99.

- Where ``2 a`` is no share below 1 (a p50), the higher share is halfway between ``a`` and 1.
- ITL: ``x`` is the share of a request's gaps over the limit. By convexity the inequality holds for any ``x`` in [0, 1];
  all requests have equal weight, whatever their lengths.
- Failures: ``a`` is ``error_rate``; if none is allowed, arithmetic has ended the load before.
- Goodput: ``x`` = 1 for a request that failed or missed a limit, ``a`` = 1 - ``goodput``.
- A mean has no such test: with a limit on one, a load is neither stopped here for it nor ended as sufficient.
- Only requests that arrived before the first unfinished one count, because fast ones finish first.
- The test assumes that misses are independent. Bursts of misses make it overconfident; the minimum number of requests
  in sidecar.measure.early_stop mitigates the worst of that, not all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from sidecar.config.slo import ERROR_RATE, MISS_RATE, LatencyKind, LatencyLimit, Slo
from sidecar.measure.least_results import misses_already
from sidecar.measure.partial_load import Arrival, EarlyStop, gaps_of, least_percentile_ms, lower_bounds
from sidecar.measure.requests import End, Ending
from vllm_sloguard.latency import tpot

_FACTOR = 2.0


@dataclass(frozen=True)
class _Sample:
    """One limit: the requests' ``x``, the allowed share, and for a percentile a lower bound on it, in ms."""

    name: str
    misses: list[float]
    allowed: float
    least_ms: float | None = None
    what: str = "requests"


def sequential_ending(sent: Sequence[Arrival], now_s: float, slo: Slo, confidence: float) -> Ending | None:
    """How the load should end, if it has shown enough; ``sent`` by arrival."""
    enough = -math.log(1 - confidence)
    samples = _samples(sent, slo)
    for sample in samples:
        if log_ratio(sample.misses, sample.allowed) >= enough:
            missed = _missed(sample, sent, now_s, slo, confidence)
            if missed is not None:
                return missed
    if any(limit.allowed_share is None for limit in slo.latency_limits):
        return None  # a limit on a mean is not tested here, and may still be missed
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
    limits = ((limit, limit.allowed_share) for limit in slo.latency_limits)
    found = [_of_limit(limit, allowed, sent, ended) for limit, allowed in limits if allowed is not None]
    if slo.error_rate > 0:
        found.append(_Sample(ERROR_RATE, [float(a.failed) for a in ended], slo.error_rate))
    if slo.goodput is not None:
        missed = [float(misses_already(a, slo.per_request)) for a in ended]
        found.append(_Sample(MISS_RATE, missed, slo.allowed_misses))
    return found


def _of_limit(limit: LatencyLimit, allowed: float, sent: Sequence[Arrival], ended: Sequence[Arrival]) -> _Sample:
    match limit.kind:
        case LatencyKind.TTFT:
            return _of_times(limit, allowed, [(a.ttft_s, a.begun) for a in sent])
        case LatencyKind.E2E:
            return _of_times(limit, allowed, [(a.e2e_s, a.ended) for a in sent])
        case LatencyKind.TPOT:
            means = (math.inf if a.failed else tpot(a.itls_s) for a in ended)
            return _of_times(limit, allowed, [(mean, True) for mean in means if mean is not None])
        case LatencyKind.ITL:
            good = [a.itls_s for a in ended if len(a.itls_s)]
            shares = [float(np.mean(np.asarray(itls_s) * 1000 > limit.limit_ms)) for itls_s in good]
            gaps = gaps_of(ended)
            least_ms = least_percentile_ms(gaps, len(gaps), 1 - allowed)
            return _Sample(limit.name, shares, allowed, least_ms, "times between tokens, by requests,")


def _of_times(limit: LatencyLimit, allowed: float, times_s: list[tuple[float, bool]]) -> _Sample:
    """Latencies, each with whether it is final: one already over the limit is conclusive even if not final."""
    known = [time_s for time_s, _ in takewhile(lambda time: time[1] or time[0] * 1000 > limit.limit_ms, times_s)]
    over = [float(time_s * 1000 > limit.limit_ms) for time_s in known]
    return _Sample(limit.name, over, allowed, least_percentile_ms(known, len(known), 1 - allowed))


def _missed(sample: _Sample, sent: Sequence[Arrival], now_s: float, slo: Slo, confidence: float) -> EarlyStop | None:
    """The end for one limit; None if the sample's own p99 met it, which is possible with unequal lengths."""
    count, over = len(sample.misses), sum(sample.misses)
    sure = f"more than {sample.allowed:.2g} of all at confidence {confidence:.0%}"
    if sample.name == ERROR_RATE:
        bounds = lower_bounds(sent, now_s, count, {}, round(over))
        return EarlyStop(End.STOP, f"{over:.0f} of {count} requests failed: {sure}", bounds)
    if sample.name == MISS_RATE:
        bounds = lower_bounds(sent, now_s, count, {}, missed=round(over))
        return EarlyStop(End.STOP, f"{over:.0f} of {count} requests failed or were over a limit: {sure}", bounds)
    limit_ms = float(getattr(slo, sample.name))
    if sample.least_ms is None or sample.least_ms <= limit_ms:
        return None
    why = f"{over:.3g} of {count} {sample.what} were over {sample.name} {limit_ms:g}: {sure}"
    return EarlyStop(End.STOP, why, lower_bounds(sent, now_s, count, {sample.name: sample.least_ms}))
