"""What came nearest to the SLO when no configuration met it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.config.slo import Slo
from sidecar.measure.capacity_search import capacity
from sidecar.record.trial import Role, Trial, TrialStatus, margins


@dataclass(frozen=True)
class NearestMiss:
    """The trial with the smallest violation, the limit that it missed by most, and by which share of the limit.

    ``estimated``: its load was stopped early, so ``excess`` is an estimate. ``highest_rate`` is the highest request
    rate, per second, at which it was measured to meet the SLO; None if no other rate was tried.
    """

    trial: int
    limit: str
    excess: float
    estimated: bool = False
    highest_rate: float | None = None

    def __str__(self) -> str:
        about = "about " if self.estimated else ""
        rate = f"; it meets the SLO at {self.highest_rate:g} requests/s" if self.highest_rate is not None else ""
        return f"trial {self.trial} came nearest and exceeds {self.limit} by {about}{self.excess:.0%}{rate}"


def nearest_miss(trials: Sequence[Trial], slo: Slo) -> NearestMiss | None:
    """The nearest miss among the baseline and the search; None if a trial met the SLO, or none was measured."""
    measured = [t for t in trials if t.plan.role in (Role.BASELINE, Role.SEARCH)]
    if any(t.status is TrialStatus.FEASIBLE for t in measured):
        return None
    missed = [miss for t in measured if t.status is TrialStatus.INFEASIBLE and (miss := _miss(t, slo)) is not None]
    return min(missed, key=lambda pair: pair[0], default=(0.0, None))[1]


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
    return violation, NearestMiss(trial.number, name, excess, bool(result.stopped), capacity(result.tried))
