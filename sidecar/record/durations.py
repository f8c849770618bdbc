"""How long trials took, and how long more of them will take."""

from collections.abc import Sequence

from sidecar.config.schema import Config
from sidecar.record.trial import VALIDATING, Trial, TrialStatus


def reserved_pairs(ran: int, config: Config) -> int:
    """For how many pairs of starts a trial of the search leaves room, after so many that ``ran``."""
    pairs = config.promotion.pairs
    # Most decisions need no more than the middle analysis; later ones use the time that is left.
    return pairs[0] if 2 * ran < config.search.budget else pairs[len(pairs) // 2]


def seconds_a_trial(trials: Sequence[Trial]) -> float:
    """The longest of the trials that ran to their end, as the next one's expected length; 0 without any."""
    ended = (t for t in trials if t.status in (TrialStatus.FEASIBLE, TrialStatus.INFEASIBLE, TrialStatus.CRASHED))
    return max((t.ended_at - t.started_at - _warm_start_s(t) for t in ended if t.ended_at is not None), default=0.0)


def seconds_of(trials: Sequence[Trial], search: int, validations: int, start_s: float) -> float:
    """How long so many more trials may take; ``start_s`` is an ordinary start, which those of a validation have.

    The first start of each side in a validation is preceded by one that is not measured.
    """
    searched = [t for t in trials if t.plan.role not in VALIDATING]
    results = [t.result for t in trials if t.result is not None]
    validation_s = max(
        seconds_a_trial([t for t in trials if t.plan.role in VALIDATING]),
        start_s + max(((r.load_s or 0.0) + (r.stop_s or 0.0) for r in results), default=0.0),
    )
    cold_sides = len(set(VALIDATING) - {t.plan.role for t in trials}) if validations else 0
    return search * seconds_a_trial(searched) + validations * validation_s + cold_sides * start_s


def _warm_start_s(trial: Trial) -> float:
    return (trial.result.warm_start_s or 0.0) if trial.result is not None else 0.0
