"""What came nearest to the SLO when no configuration met it. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from sidecar.config.slo import Slo
from sidecar.measure.capacity_search import capacity, lowest_missed
from sidecar.record.decisions import NearestMiss
from sidecar.record.trial import Role, Trial, TrialStatus, margins


def nearest_miss(trials: Sequence[Trial], slo: Slo) -> NearestMiss | None:
    """The nearest miss among the baseline and the search; None if a trial met the SLO, or none was measured."""
    measured = [t for t in trials if t.plan.role in (Role.BASELINE, Role.SEARCH)]
    if any(t.status is TrialStatus.FEASIBLE for t in measured):
        return None
    missed = [miss for t in measured if t.status is TrialStatus.INFEASIBLE and (miss := _miss(t, slo)) is not None]
    nearest = min(missed, key=lambda pair: pair[0], default=(0.0, None))[1]
    lower = [t.result for t in trials if t.plan.role is Role.LOWER_RATE and t.result is not None and t.result.tried]
    if nearest is None or not lower:
        return nearest
    rates = lower[-1].tried
    return replace(nearest, highest_rate=capacity(rates), lowest_missed=lowest_missed(rates))


def _miss(trial: Trial, slo: Slo) -> tuple[float, NearestMiss] | None:
    """The violation of ``trial``, and its worst limit."""
    result = trial.result
    if result is None or result.measurement is None:
        return None
    estimate = result.estimate
    if estimate is not None:
        excesses = {limit.name: limit.margin for limit in estimate.limits}
        violation = max(result.violation, estimate.violation)
    else:
        excesses, violation = margins(result.measurement, slo, bounds=bool(result.stopped)), result.violation
    if not excesses:
        return None
    name, excess = max(excesses.items(), key=lambda item: item[1])
    return violation, NearestMiss(trial.number, name, excess, bool(result.stopped))
