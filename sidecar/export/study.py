"""The trials of a run as Optuna's. Pure, but for the import of Optuna."""

import math
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sidecar.config import Objective
from sidecar.recorded import Setup, ran
from sidecar.trial import Status, Trial, as_json, margins
from vllm_sloguard.knobs import Kind, Knob, Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution, CategoricalChoiceType
    from optuna.trial import FrozenTrial

METRICS = {Objective.LATENCY: "e2e_mean_ms", Objective.GOODPUT: "goodput_rps", Objective.CAPACITY: "capacity_rps"}


def distributions(knobs: Sequence[Knob], rows: Sequence[dict[str, Value]]) -> "dict[str, BaseDistribution]":
    """Those of ``knobs``, wide enough for ``rows``: what serves may lie outside of what is searched."""
    return {knob.name: _distribution(knob, [row[knob.name] for row in rows if knob.name in row]) for knob in knobs}


def _distribution(knob: Knob, values: Sequence[Value]) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if knob.kind is Kind.CATEGORICAL or len(numbers) < len(values):
        choices: list[CategoricalChoiceType] = []
        for choice in (*knob.choices, *values):
            if repr(choice) not in map(repr, choices):  # 1 and True are equal, and differ
                choices.append(choice)
        return CategoricalDistribution(choices)
    low, high = min([knob.low, *numbers]), max([knob.high, *numbers])
    log = knob.log and low > 0
    if knob.kind is Kind.INT:
        return IntDistribution(math.floor(low), math.ceil(high), log=log)
    return FloatDistribution(low, high, log=log)


def frozen(trial: Trial, setup: Setup, spaces: "dict[str, BaseDistribution]") -> "FrozenTrial":
    """One trial that has ended.

    Optuna's best trial is one that is COMPLETE, and optuna-dashboard looks at no constraint for it: so only what met
    every limit is COMPLETE. What missed one is PRUNED, with its figure; what crashed, was refused or given up is FAIL.
    """
    from optuna.trial import TrialState, create_trial

    states = {Status.FEASIBLE: TrialState.COMPLETE, Status.INFEASIBLE: TrialState.PRUNED}
    state = states.get(trial.status, TrialState.FAIL)
    params = ran(trial, list(spaces))
    result = trial.result
    measurement = result.measurement if result else None
    made = create_trial(
        state=state,
        value=shown(result.value, setup.objective) if result and state is not TrialState.FAIL else None,
        params=params,
        distributions={name: spaces[name] for name in params},
        constraints=margins(measurement, setup.slo, bounds=bool(result and result.stopped)) if measurement else None,
        user_attrs=_attributes(trial),
    )
    made.datetime_start = datetime.fromtimestamp(trial.started_at)
    made.datetime_complete = datetime.fromtimestamp(trial.ended_at or trial.started_at)
    return made


def shown(value: float | None, objective: Objective) -> float | None:
    """The objective as METRICS names it: a latency is positive, and minimised."""
    if value is None or not math.isfinite(value):
        return None
    return -value if objective is Objective.LATENCY else value


def _attributes(trial: Trial) -> dict[str, Any]:
    row = as_json(trial)
    result: dict[str, Any] = row["result"] or {}
    kept: dict[str, Any] = {
        "trial": trial.number,
        "status": str(trial.status),
        "role": str(trial.plan.role),
        "phase": trial.plan.phase,
        "reason": trial.plan.reason,
        "args": row["plan"]["args"],
        "measurement": result.get("measurement"),
        "crash": result.get("crash"),
        "refusal": trial.plan.refusal,
        "stopped": result.get("stopped"),
    }
    return {name: value for name, value in kept.items() if value not in (None, "")}
