"""Forecasts how many trials fit into a window, and how its time is spent. Pure.

The same rule as the tuner's: a trial of the search is only begun if time is left for itself, for the A/B restarts
reserved for the validation, for the unmeasured start of each side before them, and for the restore. Durations are those
of this journal; where it has none, they are assumed, and marked as assumed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sidecar.config.schema import Config, Objective
from sidecar.measure.load_schedule import LoadSchedule, WarmStartLoad
from sidecar.record.durations import reserved_pairs
from sidecar.record.trial import AFTER_THE_SEARCH, VALIDATING, StartKind, Trial
from sidecar.record.trial_states import RAN_STATUSES

# Upper range of what an H200 and a CPU host took (benchmarks/README.md, "Starts and trials").
_START_S, _FAST_START_S, _WARM_UP_S = 60.0, 10.0, 5.0
# The rate is doubled until it fails, then bisected.
_CAPACITY_LOADS = 6


@dataclass(frozen=True)
class Known:
    """Seconds, and their source."""

    seconds: float
    source: str


@dataclass(frozen=True)
class Durations:
    """Durations of the parts of a window. ``longest_trial`` is the time that the tuner reserves for the next one."""

    drain: Known
    start: Known  # an ordinary start: a restore may need one
    trial: Known  # of the search, including its start
    longest_trial: Known
    validation: Known  # one measurement, including its start
    warm_start: Known  # an unmeasured start before the first measurement of a side


@dataclass(frozen=True)
class Forecast:
    """What fits into a window: ``pairs`` of A/B restarts after the search, ``pairs_reserved`` of which are reserved.

    ``trials`` are those of the search, with the baseline; seconds are expected; ``restore_s`` is reserved for the
    restore. ``analyses`` are the numbers of pairs with an interim analysis. ``validation_s`` has both sides' unmeasured
    starts in it.
    """

    window_s: float
    trials: int
    budget: int
    search_s: float
    pairs_reserved: int
    pairs: int
    analyses: tuple[int, ...]
    validation_s: float
    drain_s: float
    restore_s: float
    least_window_s: float

    @property
    def decides(self) -> bool:
        """Whether a promotion is possible: one other configuration, and enough pairs for the first interim analysis."""
        return self.trials >= 2 and bool(self.analyses)


def durations(
    config: Config, trials: Sequence[Trial], longest_start_s: float | None, drains_s: Sequence[float]
) -> Durations:
    """From ``trials`` of the same model and workload, the longest ordinary start, and how long drains took."""
    ran = [t for t in trials if t.status in RAN_STATUSES and t.ended_at is not None]
    searched = [_took(t) for t in ran if t.plan.role not in AFTER_THE_SEARCH]
    validated = [_took(t) for t in ran if t.plan.role in VALIDATING]
    warmed = [t.result.warm_start_s for t in ran if t.result and t.result.warm_start_s is not None]
    start = _start(ran, longest_start_s)
    load_s = _load_s(config, 0)
    fast_s = min(_FAST_START_S, start.seconds)
    between_s = fast_s if config.engine.forked_trials else start.seconds
    serving_s, kind = (fast_s, "a forked") if config.engine.forked_serving else (start.seconds, "an ordinary")
    trial_s = between_s + _WARM_UP_S + load_s
    requests = _requests(config, config.promotion.requests_a_start)
    validation_s = serving_s + _WARM_UP_S + _load_s(config, config.promotion.requests_a_start)
    warm_load = WarmStartLoad(_schedule(config, 0)).next_load([], warm=False)
    warm_s = serving_s + _WARM_UP_S + (warm_load.most_requests / warm_load.rate if warm_load else 0.0)
    return Durations(
        _mean(drains_s, "drains", config.window.notice, "assumed: the notice alone"),
        start,
        _mean(searched, "trials", trial_s, f"assumed: {between_s:.0f} s to start, {_load_words(config)}"),
        _longest(searched, "trials", trial_s),
        _mean(validated, "measurements", validation_s, f"assumed: {kind} start and {requests} requests"),
        _mean(warmed, "unmeasured starts", warm_s, f"assumed: {kind} start and a short load"),
    )


def forecast(config: Config, takes: Durations) -> Forecast:
    """What fits into the configured window."""
    window_s, budget, analyses = config.window.duration, config.search.budget, config.promotion.pairs
    restore_s, pair_s, warm_s = takes.start.seconds, 2 * takes.validation.seconds, 2 * takes.warm_start.seconds
    left_s = window_s - takes.drain.seconds
    trials = reserved = 0
    while trials < budget:
        pairs = reserved_pairs(trials, config)
        if left_s < restore_s + takes.longest_trial.seconds + warm_s + pairs * pair_s:
            break
        trials, reserved, left_s = trials + 1, pairs, left_s - takes.trial.seconds
    fit = min(max(math.floor((left_s - restore_s - warm_s) / pair_s), 0), analyses[-1])
    reached = tuple(look for look in analyses if look <= fit)
    return Forecast(
        window_s=window_s,
        trials=trials,
        budget=budget,
        search_s=trials * takes.trial.seconds,
        pairs_reserved=reserved,
        pairs=fit if reached else 0,
        analyses=reached,
        validation_s=warm_s + reached[-1] * pair_s if reached else 0.0,
        drain_s=takes.drain.seconds,
        restore_s=restore_s,
        least_window_s=takes.drain.seconds
        + takes.trial.seconds
        + takes.longest_trial.seconds
        + warm_s
        + analyses[0] * pair_s
        + restore_s,
    )


def drains(states: Sequence[tuple[float, str]]) -> list[float]:
    """Durations of drains that led to a search, seconds, from states with the times at which they were entered."""
    steps = pairwise(states)
    return [after - at for (at, state), (after, then) in steps if (state, then) == ("draining", "tuning")]


def _took(trial: Trial) -> float:
    """Without its unmeasured start, which no other trial of its side has."""
    assert trial.ended_at is not None
    unmeasured_s = (trial.result.warm_start_s or 0.0) if trial.result else 0.0
    return trial.ended_at - trial.started_at - unmeasured_s


def _start(ran: Sequence[Trial], longest_start_s: float | None) -> Known:
    ordinary = [t.result.start_s for t in ran if t.result and t.result.start is StartKind.ORDINARY and t.result.start_s]
    if longest_start_s is not None:
        return Known(max(longest_start_s, *ordinary, 0.0), "the longest start of the serving engine")
    return _longest(ordinary, "ordinary starts", _START_S)


def _mean(measured: Sequence[float], what: str, assumed_s: float, why: str) -> Known:
    if not measured:
        return Known(assumed_s, why)
    return Known(sum(measured) / len(measured), f"the mean of {len(measured)} {what}")


def _longest(measured: Sequence[float], what: str, assumed_s: float) -> Known:
    if not measured:
        return Known(assumed_s, "assumed")
    return Known(max(measured), f"the longest of {len(measured)} {what}")


def _schedule(config: Config, least: int) -> LoadSchedule:
    return LoadSchedule(
        config.slo, config.workload, config.objective, config.promotion.confidence, compared=True, least_requests=least
    )


def _requests(config: Config, least: int) -> int:
    """Of a whole load at the configured rate, which lasts until a queue would show."""
    load = _schedule(config, least).next_load([], warm=False)
    return load.most_requests if load is not None else least


def _load_s(config: Config, least: int) -> float:
    loads = _CAPACITY_LOADS if config.objective is Objective.CAPACITY else 1
    return loads * _requests(config, least) / config.workload.rate


def _load_words(config: Config) -> str:
    loads = f"{_CAPACITY_LOADS} loads of " if config.objective is Objective.CAPACITY else ""
    return f"{_WARM_UP_S:.0f} s to warm up, {loads}{_requests(config, 0)} requests at {config.workload.rate:g}/s"


def alike(configs: dict[int, dict[str, object]], config: Config) -> set[int]:
    """The numbers of the runs with the same model and workload: their trials predict the duration of the next."""
    same = {"model", "workload", "objective"}
    now = config.model_dump(mode="json", include=same)
    return {number for number, recorded in configs.items() if {key: recorded.get(key) for key in same} == now}
