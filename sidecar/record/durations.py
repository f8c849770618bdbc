"""Estimates how long further trials will take, from those that ran."""

from collections.abc import Sequence
from statistics import fmean

from sidecar.config.schema import Config
from sidecar.measure.load_schedule import WARM_START_LOAD_S
from sidecar.record.trial import AFTER_THE_SEARCH, VALIDATING, Trial, TrialStatus
from sidecar.record.trial_states import RAN_STATUSES


def reserved_pairs(ran: int, config: Config) -> int:
    """How many validation pairs the search must leave time for, after ``ran`` trials."""
    pairs = config.promotion.pairs
    # Most decisions need no more than the middle interim analysis; later ones use whatever time is left.
    return pairs[0] if 2 * ran < config.search.budget else pairs[len(pairs) // 2]


def seconds_a_trial(trials: Sequence[Trial]) -> float:
    """The expected length of the next trial: the longest of the completed ones; 0 without any."""
    ended = (t for t in trials if t.status in (TrialStatus.FEASIBLE, TrialStatus.INFEASIBLE, TrialStatus.CRASHED))
    return max((t.ended_at - t.started_at - _warm_start_s(t) for t in ended if t.ended_at is not None), default=0.0)


def mean_seconds(trials: Sequence[Trial]) -> float | None:
    """The mean length of the trials that ran to their end; None without any."""
    times = [t.ended_at - t.started_at for t in trials if t.ended_at is not None and t.status in RAN_STATUSES]
    return fmean(times) if times else None


def seconds_of(trials: Sequence[Trial], search: int, validations: int, start_s: float) -> float:
    """How long further trials may take; ``start_s`` is a start of the serving engine, as validation trials have.

    In a validation, each side's first measured start is preceded by an unmeasured one, with a short load.
    """
    searched = [t for t in trials if t.plan.role not in AFTER_THE_SEARCH]
    results = [t.result for t in trials if t.result is not None]
    validation_s = seconds_a_trial([t for t in trials if t.plan.role in VALIDATING])
    if not validation_s:
        validation_s = start_s + max(((r.load_s or 0.0) + (r.stop_s or 0.0) for r in results), default=0.0)
    cold_sides = len(set(VALIDATING) - {t.plan.role for t in trials}) if validations else 0
    return search * seconds_a_trial(searched) + validations * validation_s + cold_sides * _warm_start(trials, start_s)


def _warm_start(trials: Sequence[Trial], start_s: float) -> float:
    """The longest one of the run; before the first, what its start, its load and its stop take."""
    results = [t.result for t in trials if t.result is not None]
    if known := [r.warm_start_s for r in results if r.warm_start_s is not None]:
        return max(known)
    rest_s = max(((r.warmup_s or 0.0) + (r.stop_s or 0.0) for r in results), default=0.0)
    return start_s + WARM_START_LOAD_S + rest_s


def _warm_start_s(trial: Trial) -> float:
    return (trial.result.warm_start_s or 0.0) if trial.result is not None else 0.0
