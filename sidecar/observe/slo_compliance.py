"""Whether users' requests meet the SLO, limit by limit. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import fmean

from sidecar.config.slo import ERROR_RATE, MISS_RATE, LatencyKind, LatencyLimit, Slo
from sidecar.observe.traffic import Traffic
from sidecar.observe.user_requests import UserRequest, judged, latency_s, missed_slo, rate, real_requests
from vllm_sloguard.latency import GapHistogram, percentile


class SloCompliance(StrEnum):
    """Whether the SLO is met."""

    MET = "met"
    MISSED = "missed"
    UNKNOWN = "unknown"  # too few requests


@dataclass(frozen=True)
class LimitCompliance:
    """One limit of the SLO, in milliseconds or as a share; ``measured`` is None if no request has the latency."""

    name: str
    limit: float
    measured: float | None

    @property
    def missed(self) -> bool:
        """Whether what was measured is above the limit."""
        return self.measured is not None and self.measured > self.limit


@dataclass(frozen=True)
class ComplianceReport:
    """Users' requests of the last ``over_s`` seconds; ``rate`` in requests/s, None if observed too briefly."""

    compliance: SloCompliance
    over_s: float
    requests: int
    rate: float | None
    limits: tuple[LimitCompliance, ...]


def compliance_report(
    traffic: Traffic | None, now: float, slo: Slo, *, over_s: float, min_requests: int
) -> ComplianceReport:
    """The report at ``now``, in monotonic seconds; below ``min_requests`` the compliance is unknown."""
    if traffic is None:
        return ComplianceReport(SloCompliance.UNKNOWN, over_s, 0, None, ())
    since = max(traffic.since, now - over_s)
    recent = replace(traffic, requests=tuple(pair for pair in traffic.requests if pair[0] > since))
    counted = judged(real_requests(recent), slo)
    limits = _limits(counted, traffic.gaps_after(since), slo) if counted else ()
    if len(counted) < min_requests:
        compliance = SloCompliance.UNKNOWN
    else:
        compliance = SloCompliance.MISSED if any(limit.missed for limit in limits) else SloCompliance.MET
    return ComplianceReport(compliance, now - since, len(counted), rate(traffic, now, over_s), limits)


def _limits(requests: Sequence[UserRequest], gaps: GapHistogram, slo: Slo) -> tuple[LimitCompliance, ...]:
    latencies = (
        LimitCompliance(limit.name, limit.limit_ms, _ms(requests, gaps, limit)) for limit in slo.latency_limits
    )
    count: dict[str, Callable[[UserRequest], bool]] = {
        ERROR_RATE: lambda request: request.failed,
        MISS_RATE: lambda request: missed_slo(request, slo),
    }
    shares = (
        LimitCompliance(name, allowed, sum(map(count[name], requests)) / len(requests))
        for name, allowed in slo.share_limits.items()
    )
    return (*latencies, *shares)


def _ms(requests: Sequence[UserRequest], gaps: GapHistogram, limit: LatencyLimit) -> float | None:
    """What ``limit`` applies to, in milliseconds."""
    share = limit.statistic.share
    if limit.kind is LatencyKind.ITL and share is not None and gaps.n:
        seconds = gaps.percentile(share)
    else:
        found = [s for request in requests if not request.failed and (s := latency_s(request, limit)) is not None]
        seconds = percentile(found, share) if share is not None else (fmean(found) if found else None)
    return None if seconds is None else seconds * 1000
