"""Finished simulated runs in a JSON Lines file, so that an interrupted benchmark can be resumed.

A line names the task's parameters and holds the run. The file does not know the code that made it: start a new one
after a change to the search or to a landscape.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sidecar.bench.landscape import LandscapeError
from sidecar.bench.parallel import Task
from sidecar.bench.simulate import SimulatedRun, SimulationOptions

_RUN = TypeAdapter(SimulatedRun)
_Key = tuple[str, str, str, SimulationOptions, int]


class SavedRuns:
    """The runs in ``path``, or none if it does not exist. Raises LandscapeError for a line that is not a run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs: dict[_Key, SimulatedRun] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            if not line.endswith("\n"):  # cut off while it was written
                path.write_text(text[: -len(line)], encoding="utf-8")
                break
            try:
                saved: dict[str, Any] = json.loads(line)
                run = _RUN.validate_python(saved["run"])
                options = SimulationOptions(**saved["options"])
            except (ValueError, TypeError, KeyError, ValidationError):
                raise LandscapeError(f"{path}, line {number}: not a saved run") from None
            self._runs[saved["file"], run.landscape, run.optimizer, options, run.seed] = run

    def of(self, task: Task) -> list[SimulatedRun]:
        """The runs of ``task`` that are saved."""
        keys = (_key(task, seed) for seed in task.seeds)
        return [self._runs[key] for key in keys if key in self._runs]

    def add(self, task: Task, runs: Iterable[SimulatedRun]) -> None:
        """Appends runs of ``task``."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            for run in runs:
                self._runs[_key(task, run.seed)] = run
                saved = {"file": task.file.name, "options": asdict(task.options), "run": asdict(run)}
                file.write(json.dumps(saved) + "\n")


def _key(task: Task, seed: int) -> _Key:
    return task.file.name, task.landscape, task.optimizer, task.options, seed
