"""What changes by itself: the time, what is left of the window, and the latencies of the serving engine. Pure."""

from dataclasses import dataclass, replace

from sidecar.config.slo import Slo
from sidecar.observe.traffic import Traffic
from sidecar.observe.user_requests import RATE_OVER_S, rate, real_requests, summarize
from sidecar.page.slo_meters import SloMeter, figures

# Of fewer, the p99 is the slowest.
_REQUESTS_FOR_P99 = 100


@dataclass(frozen=True)
class RecentRequests:
    """The last minutes' requests of the serving engine: ``over_s`` seconds, ``rate`` requests a second of them."""

    over_s: float
    requests: int
    missed: int
    rate: float | None
    few: bool
    figures: tuple[SloMeter, ...]


@dataclass(frozen=True)
class Beat:
    """``at`` and ``next_window_at`` are in seconds since the epoch, None for no window that is planned."""

    at: float
    window_left_s: float | None
    next_window_at: float | None
    live: RecentRequests | None


def live(traffic: Traffic | None, now: float, slo: Slo) -> RecentRequests | None:
    """From what the plugin tells, at ``now`` in monotonic seconds; None while it has told nothing."""
    if traffic is None:
        return None
    since = max(traffic.since, now - RATE_OVER_S)
    recent = replace(traffic, requests=tuple(pair for pair in traffic.requests if pair[0] > since))
    requests = real_requests(recent)
    requests_per_s = rate(traffic, now, RATE_OVER_S)
    summed = summarize(requests, slo, requests_per_s, traffic.gaps_after(since))
    p99s_ms = {
        "ttft_p99_ms": summed.ttft_p99_ms,
        "itl_p99_ms": summed.itl_p99_ms,
        "e2e_p99_ms": summed.e2e_p99_ms,
    }
    few = 0 < len(requests) < _REQUESTS_FOR_P99
    return RecentRequests(now - since, len(requests), summed.missed, requests_per_s, few, figures(p99s_ms, slo))
