"""What changes every second: the time, the rest of the window, and the latencies of the serving engine. Pure."""

from dataclasses import dataclass, replace

from sidecar.config.slo import LatencyStatistic, Slo
from sidecar.observe.traffic import Traffic
from sidecar.observe.user_requests import RATE_OVER_S, rate, real_requests, summarize
from sidecar.page.slo_meters import SloMeter, slo_meters

# With fewer requests, the p99 is their maximum.
_REQUESTS_FOR_P99 = 100


@dataclass(frozen=True)
class RecentRequests:
    """Users' requests of the last ``over_s`` seconds; ``rate`` in requests/s.

    ``missed`` failed or were above a limit; ``aborted`` were cut by the client before any limit was missed.
    """

    over_s: float
    requests: int
    missed: int
    failed: int
    aborted: int
    rate: float | None
    few: bool
    meters: tuple[SloMeter, ...]


@dataclass(frozen=True)
class Heartbeat:
    """``at`` and ``next_window_at`` are in seconds since the epoch; without a scheduled window, the latter is None."""

    at: float
    window_left_s: float | None
    next_window_at: float | None
    live: RecentRequests | None


def live(traffic: Traffic | None, now: float, slo: Slo) -> RecentRequests | None:
    """The recent requests at ``now``, in monotonic seconds; None if the plugin has not reported anything."""
    if traffic is None:
        return None
    since = max(traffic.since, now - RATE_OVER_S)
    recent = replace(traffic, requests=tuple(sampled for sampled in traffic.requests if sampled.at > since))
    record = summarize(real_requests(recent), slo, rate(traffic, now, RATE_OVER_S), traffic.gaps_after(since))

    def measured_ms(statistic: LatencyStatistic) -> float | None:
        return getattr(record, statistic.name, None)  # a record has the p99s

    return RecentRequests(
        over_s=now - since,
        requests=record.requests,
        missed=record.missed,
        failed=record.failed,
        aborted=record.aborted,
        rate=record.rate,
        few=0 < record.requests < _REQUESTS_FOR_P99,
        meters=slo_meters(measured_ms, slo),
    )
