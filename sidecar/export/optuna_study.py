"""The trials of a run as Optuna trials; only ``add`` writes."""

import math
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sidecar.config.schema import Objective
from sidecar.export.optuna_rows import add_all
from sidecar.measure.verdict import in_its_unit
from sidecar.record.run_snapshot import RunSnapshot, Setup, knobs_that_ran
from sidecar.record.trial import Trial, TrialStatus, margins, trial_as_json
from vllm_sloguard.knobs import Knob, KnobKind, Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution, CategoricalChoiceType
    from optuna.study import Study
    from optuna.trial import FrozenTrial


class ExportError(RuntimeError):
    """The export failed; the message says why, in one line."""


METRICS = {Objective.LATENCY: "e2e_mean_ms", Objective.GOODPUT: "goodput_rps", Objective.CAPACITY: "capacity_rps"}


def distributions(knobs: Sequence[Knob], rows: Sequence[dict[str, Value]]) -> "dict[str, BaseDistribution]":
    """The distributions of ``knobs``, wide enough for ``rows``: the incumbent may be outside the search range."""
    return {knob.name: _distribution(knob, [row[knob.name] for row in rows if knob.name in row]) for knob in knobs}


def _distribution(knob: Knob, values: Sequence[Value]) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if knob.kind is KnobKind.CATEGORICAL or len(numbers) < len(values):
        choices: list[CategoricalChoiceType] = []
        for choice in (*knob.choices, *values):
            if repr(choice) not in map(repr, choices):  # 1 == True, but they are different choices
                choices.append(choice)
        return CategoricalDistribution(choices)
    low, high = min([knob.low, *numbers]), max([knob.high, *numbers])
    log = knob.log and low > 0
    if knob.kind is KnobKind.INT:
        return IntDistribution(math.floor(low), math.ceil(high), log=log)
    return FloatDistribution(low, high, log=log)


def frozen(trial: Trial, setup: Setup, spaces: "dict[str, BaseDistribution]") -> "FrozenTrial":
    """One trial that has ended.

    Optuna picks its best trial among the COMPLETE ones, and optuna-dashboard ignores constraints, so only trials
    that met every limit are COMPLETE. Infeasible trials are PRUNED, with their value; crashed, refused and aborted ones
    are FAIL.
    """
    from optuna.trial import TrialState, create_trial

    states = {TrialStatus.FEASIBLE: TrialState.COMPLETE, TrialStatus.INFEASIBLE: TrialState.PRUNED}
    state = states.get(trial.status, TrialState.FAIL)
    params = knobs_that_ran(trial, list(spaces))
    result = trial.result
    measurement = result.measurement if result else None
    made = create_trial(
        state=state,
        value=in_its_unit(result.value, setup.objective) if result and state is not TrialState.FAIL else None,
        params=params,
        distributions={name: spaces[name] for name in params},
        constraints=margins(measurement, setup.slo, bounds=bool(result and result.stopped)) if measurement else None,
        user_attrs=_attributes(trial),
    )
    made.datetime_start = datetime.fromtimestamp(trial.started_at)
    made.datetime_complete = datetime.fromtimestamp(trial.ended_at or trial.started_at)
    return made


def _attributes(trial: Trial) -> dict[str, Any]:
    row = trial_as_json(trial)
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


def add(snapshot: RunSnapshot, url: str, name: str, shown_as: Callable[[list[Trial]], Iterable[Trial]]) -> int:
    """Adds the trials that have ended to the study ``name``, created if it is missing, and returns their number.

    Existing trials are skipped, so that a growing run can be exported repeatedly. ``shown_as`` wraps the iteration, for
    a progress bar. Raises ExportError.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    setup = snapshot.setup
    ended = [t for t in snapshot.trials if t.status is not TrialStatus.RUNNING]
    rows = [knobs_that_ran(t, [knob.name for knob in setup.knobs]) for t in ended]
    spaces = distributions(setup.knobs, rows)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = "minimize" if setup.objective is Objective.LATENCY else "maximize"
    try:
        storage = optuna.storages.RDBStorage(url)
        study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
        _check_origin(study, snapshot)
        known = {t.user_attrs.get("trial") for t in study.get_trials(deepcopy=False)}
        new = [t for t in ended if t.number not in known]
        add_all(study, storage, [frozen(trial, setup, spaces) for trial in shown_as(new)])
    except (SQLAlchemyError, ImportError, ValueError, optuna.exceptions.OptunaError) as error:
        # Only the first line: SQLAlchemy appends the statement.
        raise ExportError(f"--optuna: {str(error).splitlines()[0]}") from None
    return len(new)


def _check_origin(study: "Study", snapshot: RunSnapshot) -> None:
    """Marks a new study with its origin; refuses one with the same name and another origin."""
    setup, run = snapshot.setup, snapshot.run
    origin: dict[str, Any] = {"digest": run.digest, "started_at": run.started_at}
    if not study.user_attrs:
        about = {"model": setup.model, "slo": setup.slo.model_dump(), "objective": METRICS[setup.objective]}
        for key, value in {**origin, **about}.items():
            study.set_user_attr(key, value)
    elif {key: study.user_attrs.get(key) for key in origin} != origin:
        raise ExportError(f"the study {study.study_name!r} in this storage belongs to another run: use another storage")
