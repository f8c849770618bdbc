"""Lower bounds on the final statistics of a partial load, by arithmetic. Pure.

An unknown request counts as one that takes no time, so each percentile and each share can only grow. Means are left
out: a slow request in flight may still fail, and failed requests are in no mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidecar.config.slo import LatencyKind, LatencyLimit, LatencyStatistic, Slo, Statistic, within_limits
from sidecar.measure.measurement import request_latency_s
from sidecar.measure.partial_load import Arrival, gaps_of, least_percentile_ms, rank
from vllm_sloguard.latency import tpot

# Shown of every stopped load, limited or not.
_ALWAYS = tuple(LatencyStatistic(kind, Statistic.P99) for kind in (LatencyKind.TTFT, LatencyKind.ITL, LatencyKind.E2E))


@dataclass(frozen=True)
class Sample:
    """The latencies known so far, in seconds, of a sample that grows to at most ``total``."""

    known_s: NDArray[np.float64]
    total: int

    def over(self, limit: LatencyLimit) -> tuple[int, int]:
        """How many exceed the limit, and how many may."""
        allowed = rank(self.total, limit.statistic.share or 0.0) - 1
        return int((self.known_s * 1000 > limit.limit_ms).sum()), allowed


def sample_of(sent: Sequence[Arrival], planned: int, kind: LatencyKind, most_gaps: int) -> Sample:
    """The sample of ``kind`` of a load of ``planned`` requests, of ``most_gaps`` gaps between tokens each."""
    match kind:
        case LatencyKind.TTFT:
            return Sample(np.array([a.ttft_s for a in sent]), planned)
        case LatencyKind.E2E:
            return Sample(np.array([a.e2e_s for a in sent]), planned)
        case LatencyKind.TPOT:
            means = (np.inf if a.failed else tpot(a.itls_s) for a in sent if a.ended)
            return Sample(np.array([mean for mean in means if mean is not None]), planned)
        case LatencyKind.ITL:
            gaps = gaps_of(sent)
            return Sample(gaps, len(gaps) + (planned - sum(a.ended for a in sent)) * most_gaps)


def least_percentiles_ms(sent: Sequence[Arrival], planned: int, slo: Slo, most_gaps: int) -> dict[str, float | None]:
    """By name, lower bounds on the limited percentiles and on the p99s; None where there is no bound."""
    wanted = [(s, share) for s in (*_ALWAYS, *slo.latency_limits) if (share := s.statistic.share) is not None]
    samples = {kind: sample_of(sent, planned, kind, most_gaps) for kind in {s.kind for s, _ in wanted}}
    return {s.name: least_percentile_ms(samples[s.kind].known_s, samples[s.kind].total, share) for s, share in wanted}


def misses_already(request: Arrival, limits: Sequence[LatencyLimit]) -> bool:
    """Whether a request will count as a miss, however it ends. Of its gaps nothing is known before its end."""
    return request.failed or not within_limits(limits, lambda limit: request_latency_s(request, limit))
