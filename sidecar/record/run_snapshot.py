"""Snapshots of a run from the journal, for the report, the page and exports."""

import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from sidecar.config.knob_ranges import overridden
from sidecar.config.schema import Config, EngineConfig, Objective, Workload
from sidecar.config.search_section import KnobRange
from sidecar.config.slo import Slo
from sidecar.config.window import Promotion
from sidecar.record import lock
from sidecar.record.decisions import Decision
from sidecar.record.events import Operations
from sidecar.record.journal import Journal, Promoted, Run, StateRecord
from sidecar.record.row_validation import JournalError, problem
from sidecar.record.trial import Trial
from vllm_sloguard.knobs import KNOBS, Knob, Value

_Section = TypeVar("_Section", bound=BaseModel)


@dataclass(frozen=True)
class Setup:
    """The parts of the configuration that a run depends on; ``content`` is the whole recorded configuration."""

    model: str
    args: dict[str, Any]
    slo: Slo
    objective: Objective
    workload: Workload
    promotion: Promotion
    knobs: tuple[Knob, ...]
    budget: int
    optimizer: str
    seed: int
    content: dict[str, Any]
    device: str = ""  # empty in journals of earlier versions
    driver: str = ""

    @property
    def base_digest(self) -> str:
        """As Config.base_digest."""
        engine = EngineConfig.model_construct(args=self.args)
        return Config.model_construct(model=self.model, engine=engine).base_digest()


@dataclass(frozen=True)
class RunSnapshot:
    """One run of ``runs``, as of ``now`` in seconds since the epoch.

    ``promotions`` are those over the same file arguments. ``state`` is the sidecar's last state, None if only
    `sloguard tune` ever ran; ``alive`` is whether it is running.
    """

    folder: Path
    runs: tuple[int, ...]
    run: Run
    decision: Decision | None
    setup: Setup
    trials: tuple[Trial, ...]
    promotions: tuple[Promoted, ...]
    state: StateRecord | None
    alive: bool
    now: float

    @property
    def until(self) -> float:
        """When the run ended; now if it is in progress; the last recorded time if it was cut off."""
        if self.run.ended_at is not None:
            return self.run.ended_at
        return self.now if self.alive else max(map(self.end_of, self.trials), default=self.run.started_at)

    def end_of(self, trial: Trial) -> float:
        """When a trial of it ended, likewise."""
        return trial.ended_at or (self.now if self.alive else trial.started_at)


def read_run(folder: Path, number: int | None = None) -> RunSnapshot:
    """Run ``number``, or the newest. Raises JournalError, also if there is none."""
    with closing(Journal(folder, read_only=True)) as journal:
        # Read the configurations last, so that they include a run that begins meanwhile.
        run = journal.last_run() if number is None else journal.run(number)
        configs = _configs(folder, journal)
        if run is None:
            raise JournalError(f"{folder}: there is no run {number}; there are {', '.join(map(str, configs))}")
        return _snapshot(folder, journal, configs, run)


def read_all(folder: Path) -> list[RunSnapshot]:
    """Every run, oldest first. Raises JournalError, also if there is none."""
    with closing(Journal(folder, read_only=True)) as journal:
        configs = _configs(folder, journal)
        runs = [run for number in configs if (run := journal.run(number)) is not None]
        return [_snapshot(folder, journal, configs, run) for run in runs]


def _configs(folder: Path, journal: Journal) -> dict[int, dict[str, Any]]:
    configs = journal.run_configs()
    if not configs:
        raise JournalError(f"{folder}: no tuning run was recorded yet; `sloguard tune` and `sloguard serve` make them")
    return configs


def _snapshot(folder: Path, journal: Journal, configs: dict[int, dict[str, Any]], run: Run) -> RunSnapshot:
    setup = setup_of(configs[run.id], run.id)
    return RunSnapshot(
        folder=folder.absolute(),
        runs=tuple(configs),
        run=run,
        decision=run.decision,
        setup=setup,
        trials=tuple(journal.trials(run.id)),
        promotions=tuple(Operations(journal, setup.base_digest).promotions()),
        state=journal.state(),
        alive=lock.holder(folder) is not None,
        now=time.time(),
    )


def knobs_that_ran(trial: Trial, names: Sequence[str]) -> dict[str, Value]:
    """The knobs as they ran, after both repairs; as proposed if the trial was refused."""
    ran = trial.args_that_ran
    return {name: value for name in names if (value := ran.get(name)) is not None and not isinstance(value, list)}


def setup_of_config(config: Config) -> Setup:
    """What a run of ``config`` depends on."""
    return setup_of(config.model_dump(mode="json"), 0)


def setup_of(content: dict[str, Any], run: int) -> Setup:
    """Parses the recorded configuration of ``run``, from any version of sloguard. Raises JournalError."""
    search, engine = _part(content, "search"), _part(content, "engine")
    try:
        return Setup(
            model=str(content["model"]),
            args=_part(engine, "args"),
            slo=_section(Slo, content),
            objective=Objective(content["objective"]),
            workload=_section(Workload, content),
            promotion=_section(Promotion, content),
            # Skip knobs that only other versions have.
            knobs=tuple(_knob(name, given) for name, given in _part(search, "knobs").items() if name in KNOBS),
            budget=int(search["budget"]),
            optimizer=str(search["optimizer"]),
            seed=int(search.get("seed", 0)),
            content=content,
            device=str(content.get("device") or ""),
            driver=str(content.get("driver") or ""),
        )
    except ValidationError as error:
        raise JournalError(f"run {run}: its configuration can't be read: {problem(error)}") from None
    except (LookupError, TypeError, ValueError) as error:
        raise JournalError(f"run {run}: its configuration can't be read: {type(error).__name__}: {error}") from None


def _section(section: type[_Section], content: dict[str, Any]) -> _Section:
    """Parses a section, ignoring fields of other versions."""
    given = _part(content, section.__name__.lower())
    return section.model_validate_json(json.dumps({k: v for k, v in given.items() if k in section.model_fields}))


def _knob(name: str, given: Any) -> Knob:
    limits = KnobRange.model_validate(given or {})
    return overridden(name, limits.low, limits.high, limits.choices)


def _part(content: dict[str, Any], name: str) -> dict[str, Any]:
    part: object = content.get(name) or {}
    if not isinstance(part, dict):
        raise JournalError(f"the journal is damaged: configuration: {name}: an object is needed")
    return cast("dict[str, Any]", part)
