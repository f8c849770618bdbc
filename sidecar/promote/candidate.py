"""Which configuration of the search is validated. The rule by which it is then promoted is sidecar.promote.decision."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.config.schema import Config
from sidecar.config.slo import Slo
from sidecar.record.trial import Role, Trial, TrialStatus
from sidecar.search.contract import Observation
from sidecar.search.recommendation import raised_bar, recommended
from sidecar.search.space import Space
from vllm_sloguard.knobs import Knob

_MEASURED = (Role.BASELINE, Role.SEARCH)


@dataclass(frozen=True)
class SearchedSpace:
    """The knobs of a search and the SLO: what the models need to read its trials."""

    knobs: tuple[Knob, ...]
    slo: Slo

    @classmethod
    def of(cls, config: Config) -> "SearchedSpace":
        """That of a configuration file."""
        return cls(tuple(config.search.space_knobs()), config.slo)


@dataclass(frozen=True)
class Leader:
    """The best trial by the models, baseline included; if ``worth_beating``, slower loads need not go on.

    ``bar`` is how much better loads were estimated to be that were stopped for it: a log ratio, 0 or less.
    """

    trial: Trial
    worth_beating: bool
    bar: float = 0.0
    bar_sd: float = 0.0


def baseline(trials: Sequence[Trial]) -> Trial | None:
    """The incumbent's own trial in this run; one that was aborted is measured again."""
    ended = (t for t in reversed(trials) if t.plan.role is Role.BASELINE and t.status is not TrialStatus.ABORTED)
    return next(ended, None)


def candidate(trials: Sequence[Trial], searched: SearchedSpace | None = None) -> Trial | None:
    """The trial to validate; None if no whole load met the SLO with a better value than the incumbent's.

    With ``searched`` the models choose (sidecar.search.recommendation), else the best single measurement.
    """
    incumbent = baseline(trials)
    feasible = [t for t in trials if t.plan.role is Role.SEARCH and _whole_and_feasible(t)]
    if incumbent is not None and _whole_and_feasible(incumbent):
        feasible = [t for t in feasible if _value(t) > _value(incumbent)]
    if not feasible:
        return None
    begun = next((t.plan.args for t in trials if t.plan.role is Role.VALIDATION), None)
    if validated := [t for t in feasible if t.plan.args == begun]:
        return max(validated, key=_value)  # the choice stands, also in journals of earlier versions
    chosen = leader(trials, searched, among=feasible) if searched is not None else None
    return chosen.trial if chosen is not None else max(feasible, key=_value)


def leader(trials: Sequence[Trial], searched: SearchedSpace, among: Sequence[Trial] | None = None) -> Leader | None:
    """The best by the models of ``among``, or of all whole loads that met the SLO; None if there is none."""
    kept: list[Trial] = []
    history: list[Observation] = []
    names = tuple(knob.name for knob in searched.knobs)
    for trial in trials:
        seen = trial.observation(names, searched.slo) if trial.plan.role in _MEASURED else None
        if seen is not None:
            kept.append(trial)
            history.append(seen)
    numbers = None if among is None else {t.number for t in among}
    rows = None if numbers is None else [n for n, trial in enumerate(kept) if trial.number in numbers]
    found = recommended(Space(searched.knobs), history, among=rows)
    if found is None:
        return None
    return Leader(kept[found.index], found.worth_beating, *raised_bar(history, found.index))


def _whole_and_feasible(trial: Trial) -> bool:
    return trial.status is TrialStatus.FEASIBLE and trial.result is not None and not trial.result.stopped


def _value(trial: Trial) -> float:
    assert trial.result is not None
    return -math.inf if trial.result.value is None else trial.result.value
