"""Whether a load shows a steady state, or only the transient before a queue builds up. Pure.

An engine at 10% overload looks fine at first: the queueing delay grows by 0.1 s per second. So a load must last ten
times the tightest latency limit; at 10% overload its last requests then wait for as long as that limit. And completions
must keep up with arrivals: in the second half of the sending time, with the batches full, arrivals may not exceed
completions by more than the noise of a Poisson count.
"""

import math
from enum import StrEnum

from sidecar.config.slo import LatencyKind, Slo
from sidecar.measure.requests import Ending, LoadProgress, LoadResult, StopRule
from vllm_sloguard.starts.load_protocol import End

_TIMES_THE_LIMIT = 10.0
# Multiple of an ITL limit: a request of a hundred tokens at the limit.
_TIMES_THE_GAP = 100.0
_LONGEST_LEAST_S = 60.0
# Multiples of the first requests' E2E latency: for the number in flight to settle, plus one.
_TIMES_E2E = 3.0
_SIGMAS = 2.0
_FEWEST_REQUESTS = 20


class SteadyState(StrEnum):
    """The long-run behaviour that a load shows."""

    STEADY = "steady"
    GROWING = "growing"  # more arrivals than completions
    TOO_SHORT = "too_short"  # for a verdict


def least_duration_s(slo: Slo) -> float:
    """How long requests must be sent for a queue to show in a latency that ``slo`` limits; 60 s at most."""
    whole = [limit.limit_ms for limit in slo.latency_limits if limit.kind in (LatencyKind.TTFT, LatencyKind.E2E)]
    gaps = [limit.limit_ms for limit in slo.latency_limits]
    wanted_ms = _TIMES_THE_LIMIT * min(whole) if whole else _TIMES_THE_GAP * min(gaps)
    return min(wanted_ms / 1000, _LONGEST_LEAST_S)


def steady_state(load: LoadResult, slo: Slo) -> SteadyState | None:
    """The long-run behaviour shown by a complete ``load``; None if its client did not report the times."""
    times = _times(load)
    if times is None:
        return None
    starts, _ = times
    if len(starts) < _FEWEST_REQUESTS or sending_s(load) < 0.9 * max(least_duration_s(slo), settling_s(load)):
        return SteadyState.TOO_SHORT
    arrived, answered = _second_half(load)
    return SteadyState.GROWING if arrived - answered > _SIGMAS * math.sqrt(arrived) else SteadyState.STEADY


def overload(load: LoadResult) -> float:
    """The relative excess of arrivals over completions in the second half of the sending time; 0 for none."""
    arrived, answered = _second_half(load)
    return max(arrived / max(answered, 1) - 1, 0.0)


def settling_s(load: LoadResult) -> float:
    """The load duration needed for the number in flight to settle, from the first quarter's E2E latency."""
    times = _times(load)
    if times is None or not times[0]:
        return 0.0
    starts, ends = times
    first = max(len(starts) // 4, 1)
    return _TIMES_E2E * sum(end - start for start, end in zip(starts[:first], ends[:first], strict=True)) / first


def sending_s(load: LoadResult) -> float:
    """From the first request sent to the last; 0 if the client did not report the times."""
    starts = [r.start_s for r in load.requests if r.start_s is not None]
    return max(starts) - min(starts) if starts else 0.0


def lasting(rule: StopRule, slo: Slo) -> StopRule:
    """``rule``, but a load that has shown enough continues until a queue would show."""
    least_s = least_duration_s(slo)

    def lengthened(progress: LoadProgress) -> Ending | None:
        ending = rule(progress)
        if ending is None or ending.how is End.STOP:
            return ending
        starts = [r.start_s for r in (*progress.finished, *progress.in_flight) if r.start_s is not None]
        return ending if starts and progress.now_s - min(starts) >= least_s else None

    return lengthened


def _second_half(load: LoadResult) -> tuple[int, int]:
    """Successful requests that arrived, and that completed, in the second half of the sending time."""
    times = _times(load)
    if times is None or not times[0]:
        return 0, 0
    starts, ends = times
    first, last = starts[0], starts[-1]
    middle = (first + last) / 2
    return sum(middle < at <= last for at in starts), sum(middle < at <= last for at in ends)


def _times(load: LoadResult) -> tuple[list[float], list[float]] | None:
    """Starts (sorted) and ends of the successful requests; None if a start is unknown."""
    if any(r.start_s is None for r in load.requests):
        return None
    pairs = sorted(
        (r.start_s, r.start_s + r.e2e_s)
        for r in load.requests
        if r.start_s is not None and r.e2e_s is not None and not r.error
    )
    return [start for start, _ in pairs], [end for _, end in pairs]
