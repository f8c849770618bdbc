"""Coordinated omission: whether the load generator sent its requests on time. Pure.

Latencies are counted from when a request was sent. A generator that is itself held up sends late exactly when the
machine is busiest, and hides the wait that a user would have had. Such a load does not count as a measurement.
"""

from dataclasses import dataclass

from sidecar.config.slo import LatencyKind, Slo
from sidecar.measure.requests import LoadResult
from vllm_sloguard.latency import percentile

# A lag below this share of the tightest limit hardly affects a verdict; a busy event loop always has some.
_SHARE_OF_LIMIT = 0.1
_ALWAYS_ALLOWED_S = 0.05
# If only gaps between tokens are limited, lag matters only through the arrival rate.
_ALLOWED_WITHOUT_LIMIT_S = 0.25
_SHARE_LATE = 0.05


@dataclass(frozen=True)
class SenderLag:
    """How late the requests of a load were sent."""

    p99_s: float
    late: int  # requests sent more than ``allowed_s`` late
    requests: int
    allowed_s: float

    @property
    def fell_behind(self) -> bool:
        """Whether too many requests were late for the load to count as a measurement."""
        return self.late > _SHARE_LATE * self.requests

    @property
    def reason(self) -> str:
        """Why the load does not count."""
        return (
            f"the load generator fell behind: {self.late} of {self.requests} requests were sent more than"
            f" {self.allowed_s * 1000:.0f} ms late (p99 {self.p99_s * 1000:.0f} ms)"
        )


def sender_lag(load: LoadResult, slo: Slo) -> SenderLag | None:
    """The lag of ``load``; None if its client did not report the due times."""
    lags = [r.start_s - r.intended_s for r in load.requests if r.start_s is not None and r.intended_s is not None]
    p99_s = percentile(lags, 0.99)
    if p99_s is None:
        return None
    allowed_s = allowed_lag_s(slo)
    return SenderLag(p99_s, sum(lag > allowed_s for lag in lags), len(lags), allowed_s)


def allowed_lag_s(slo: Slo) -> float:
    """The allowed delay: a tenth of the tightest limit on TTFT or E2E latency, at least 50 ms."""
    limits_ms = [limit.limit_ms for limit in slo.latency_limits if limit.kind in (LatencyKind.TTFT, LatencyKind.E2E)]
    if not limits_ms:
        return _ALLOWED_WITHOUT_LIMIT_S
    return max(_SHARE_OF_LIMIT * min(limits_ms) / 1000, _ALWAYS_ALLOWED_S)
