"""The statistics of one load. Pure.

In the percentiles of TTFT, TPOT and E2E latency a failed request counts as one that never ended. Most clients leave
failed requests out, and so report only the survivors' latencies.
"""

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

from sidecar.config.slo import (
    LATENCY_STATISTICS,
    LatencyKind,
    LatencyLimit,
    LatencyStatistic,
    Slo,
    Statistic,
    within_limits,
)
from sidecar.measure.requests import LoadResult, RequestResult
from sidecar.measure.sender_lag import sender_lag
from sidecar.measure.steady_state import SteadyState, steady_state
from vllm_sloguard.latency import interval_ranks, itl_of_request, least_resolving, nearest_rank, percentile, tpot

_JSON = ConfigDict(ser_json_inf_nan="strings")


@pydantic_dataclass(frozen=True, config=_JSON)
class PercentileInterval:
    """The 99% confidence interval of a percentile, per side. None where ``n`` values are too few for a bound."""

    name: str
    low_ms: float | None
    high_ms: float | None
    n: int
    needed: int  # minimum sample size for an upper bound

    @property
    def resolved(self) -> bool:
        """Whether the sample was large enough for an upper bound."""
        return self.n >= self.needed


@pydantic_dataclass(frozen=True, config=_JSON)
class Measurement:
    """The statistics of one load. ``None`` is unmeasured, which never meets a limit; ``inf`` is due to failed requests.

    ``intervals`` are those of the percentiles that the SLO limits.
    """

    requests: int
    failed: int
    duration_s: float
    ttft_p99_ms: float | None
    itl_p99_ms: float | None
    e2e_p99_ms: float | None
    ttft_mean_ms: float | None  # means are over the requests that succeeded
    e2e_mean_ms: float | None
    goodput_rps: float  # requests per second that met every limit
    # Missing in journals of earlier versions.
    ttft_p50_ms: float | None = None
    ttft_p90_ms: float | None = None
    ttft_p95_ms: float | None = None
    itl_p50_ms: float | None = None
    itl_p90_ms: float | None = None
    itl_p95_ms: float | None = None
    itl_mean_ms: float | None = None
    tpot_p50_ms: float | None = None
    tpot_p90_ms: float | None = None
    tpot_p95_ms: float | None = None
    tpot_p99_ms: float | None = None
    tpot_mean_ms: float | None = None
    e2e_p50_ms: float | None = None
    e2e_p90_ms: float | None = None
    e2e_p95_ms: float | None = None
    goodput_share: float | None = None  # share of all requests that met every limit
    output_tokens_per_s: float | None = None  # of requests that succeeded
    intervals: tuple[PercentileInterval, ...] = ()
    steady: SteadyState | None = None
    sender_lag_p99_ms: float | None = None  # delay of sending behind the schedule

    @property
    def error_rate(self) -> float:
        """Share of failed requests."""
        return self.failed / self.requests if self.requests else 1.0

    @property
    def miss_rate(self) -> float | None:
        """Share of requests that failed or missed a limit that applies to a single request; None if unmeasured."""
        return None if self.goodput_share is None else round(1 - self.goodput_share, 9)

    def latency_ms(self, statistic: LatencyStatistic) -> float | None:
        """The measured value of ``statistic``; None if unmeasured."""
        return getattr(self, statistic.name)

    @property
    def unresolved(self) -> tuple[PercentileInterval, ...]:
        """The limited percentiles whose sample was too small."""
        return tuple(interval for interval in self.intervals if not interval.resolved)


def measure(load: LoadResult, slo: Slo) -> Measurement:
    """The statistics of ``load``; goodput and the intervals are those of ``slo``."""
    samples = {kind: _sample(load.requests, kind) for kind in LatencyKind}
    latencies = {s.name: _statistic_ms(samples[s.kind], s.statistic) for s in LATENCY_STATISTICS}
    limits = slo.per_request
    met = sum(_meets(request, limits) for request in load.requests)
    lag = sender_lag(load, slo)
    return Measurement(
        requests=len(load.requests),
        failed=sum(bool(request.error) for request in load.requests),
        duration_s=load.duration_s,
        goodput_rps=met / load.duration_s if load.duration_s > 0 else 0.0,
        goodput_share=met / len(load.requests) if load.requests else None,
        output_tokens_per_s=_output_tokens(load.requests) / load.duration_s if load.duration_s > 0 else None,
        intervals=tuple(
            _interval(samples[limit.kind], limit, share)
            for limit in slo.latency_limits
            if (share := limit.statistic.share) is not None and samples[limit.kind]
        ),
        steady=steady_state(load, slo),
        sender_lag_p99_ms=None if lag is None else lag.p99_s * 1000,
        **latencies,
    )


def _output_tokens(requests: Sequence[RequestResult]) -> int:
    """Streamed tokens: one gap precedes each token but the first."""
    return sum(1 + len(r.itls_s) for r in requests if not r.error and r.ttft_s is not None)


def meets(request: RequestResult, slo: Slo) -> bool:
    """Whether one request met every limit that a single request can miss.

    ``itl_p99_ms`` applies to the p99 of its own gaps, or to its largest gap if that is a stall; ``tpot_p99_ms`` to
    their mean.
    """
    return _meets(request, slo.per_request)


def _meets(request: RequestResult, limits: Sequence[LatencyLimit]) -> bool:
    return not request.error and within_limits(limits, lambda limit: request_latency_s(request, limit))


class MeasuredRequest(Protocol):
    """One request's latencies, in seconds."""

    @property
    def ttft_s(self) -> float | None: ...

    @property
    def e2e_s(self) -> float | None: ...

    @property
    def itls_s(self) -> Sequence[float]: ...


def request_latency_s(request: MeasuredRequest, limit: LatencyLimit) -> float | None:
    """The latency of one request that ``limit`` applies to, in seconds; None for a gap of a single-token request."""
    match limit.kind:
        case LatencyKind.TTFT:
            return never_if_none(request.ttft_s)
        case LatencyKind.E2E:
            return never_if_none(request.e2e_s)
        case LatencyKind.TPOT:
            return tpot(request.itls_s)
        case LatencyKind.ITL:
            own = percentile(request.itls_s, limit.statistic.share or 0.0)
            return None if own is None else itl_of_request(own, max(request.itls_s), limit.limit_ms / 1000)


def never_if_none(seconds: float | None) -> float:
    """A latency in seconds; infinite if the request was never answered."""
    return math.inf if seconds is None else seconds


def _sample(requests: Sequence[RequestResult], kind: LatencyKind) -> list[float]:
    """The sorted latencies of ``kind``, in seconds; infinite for failed requests, which ITL leaves out."""
    good = [r for r in requests if not r.error]
    failed = [math.inf] * (len(requests) - len(good))
    match kind:
        case LatencyKind.TTFT:
            return sorted([never_if_none(r.ttft_s) for r in good] + failed)
        case LatencyKind.E2E:
            return sorted([never_if_none(r.e2e_s) for r in good] + failed)
        case LatencyKind.TPOT:
            return sorted([mean for r in good if (mean := tpot(r.itls_s)) is not None] + failed)
        case LatencyKind.ITL:
            return np.sort(
                np.concatenate([np.empty(0), *(np.asarray(r.itls_s, dtype=np.float64) for r in good)])
            ).tolist()


def _statistic_ms(ascending: Sequence[float], statistic: Statistic) -> float | None:
    if statistic.share is None:
        failed = sum(1 for _ in takewhile(math.isinf, reversed(ascending)))
        finite = ascending[: len(ascending) - failed]
        return math.fsum(finite) / len(finite) * 1000 if finite else None
    return ascending[nearest_rank(len(ascending), statistic.share) - 1] * 1000 if ascending else None


def _interval(ascending: Sequence[float], limit: LatencyStatistic, share: float) -> PercentileInterval:
    n = len(ascending)
    low, high = (ascending[rank - 1] * 1000 if rank else None for rank in interval_ranks(n, share))
    return PercentileInterval(limit.name, low, high, n, least_resolving(share))
