"""The command `sloguard dev bench`."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from sidecar.bench import report
from sidecar.bench.landscape import Landscape, load_landscapes
from sidecar.bench.parallel import Task, run_all
from sidecar.bench.saved_runs import SavedRuns
from sidecar.bench.simulate import SimulatedRun, SimulationOptions
from sidecar.bench.summary import SummaryRow, best_known, row
from sidecar.cli import bench_promotion, bench_restart
from sidecar.config.schema import ConfigError
from sidecar.search.registry import ABLATIONS, DEFAULT, OPTIMIZERS, make
from sidecar.search.space import Space
from vllm_sloguard.knobs import Knob, KnobKind

bench_app = typer.Typer(no_args_is_help=True)
bench_app.command()(bench_promotion.promotion)
bench_app.command()(bench_restart.restart)


def optimizer_names(incomplete: str) -> list[str]:
    """Shell completion for a list of optimizers."""
    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    return [f"{before}{comma}{n}" for n in (*OPTIMIZERS, *ABLATIONS) if n.startswith(last) and n not in given]


_ANY = Space((Knob("any", KnobKind.FLOAT, 0, 1),))  # to check that an optimizer can be made


@bench_app.callback()
def bench() -> None:
    """Run benchmarks of sloguard's own parts."""


@bench_app.command()
def optimizers(
    *,
    files: Annotated[list[Path], typer.Option("--landscape", metavar="FILE", help="Landscapes; may be repeated.")],
    only: Annotated[str, typer.Option(metavar="NAME", help="Only this landscape of the files.")] = "",
    names: Annotated[
        str,
        typer.Option("--optimizers", metavar="A,B", help="Default: all.", autocompletion=optimizer_names),
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs per optimizer and landscape.")] = 20,
    budget: Annotated[int, typer.Option(min=1, help="Trials per run.")] = 15,
    no_guard: Annotated[bool, typer.Option("--no-guard", help="Run without the guard.")] = False,
    whole_loads: Annotated[
        bool, typer.Option("--whole-loads", help="Never stop a load early (landscapes with serve).")
    ] = False,
    ablation: Annotated[bool, typer.Option("--ablation", help="Drop one part of the default at a time.")] = False,
    against: Annotated[
        str, typer.Option(metavar="NAME", help="The optimizer to compare with.", autocompletion=optimizer_names)
    ] = "",
    early_stop_cost: Annotated[
        bool, typer.Option("--early-stop-cost", help="Run the default also with complete loads, and compare.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    results: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save each run here; skip those that are saved already.")
    ] = None,
    time_limit_s: Annotated[
        float, typer.Option("--time-limit", metavar="SECONDS", min=0, help="Start no run after this time.")
    ] = math.inf,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    into: Annotated[Path | None, typer.Option(metavar="FILE", help="Update the table in this file.")] = None,
) -> None:
    """Compare optimizers on simulated tuning runs: lowest latency among feasible configurations.

    "best" is the lowest latency that a run measured, "regret" its median relative to the best known one, "served" the
    latency of the chosen configuration in a new evaluation.

    Example: sloguard dev bench optimizers --landscape benchmarks/landscapes/paper.py --seeds 20
    """
    chosen = _chosen(names, budget, ablation=ablation)
    reference = against or (DEFAULT if ablation else "tba-tpe")
    if against and against not in chosen:
        raise ConfigError(f"--against: {against!r} is not among the optimizers: {', '.join(chosen)}")
    if early_stop_cost and (whole_loads or DEFAULT not in chosen):
        raise ConfigError(f"--early-stop-cost: needs {DEFAULT} with early stops")
    options = SimulationOptions(budget, guarded=not no_guard, whole_loads=whole_loads)
    variants = [Variant(name, name, options) for name in chosen]
    if early_stop_cost:
        variants.append(whole_loads_of(DEFAULT, options))
    loaded = [(file, landscape) for file in files for landscape in load_landscapes(file, only or None).values()]
    section = ("ablation" if ablation else "optimizers") + (" without the guard" if no_guard else "")
    sections = [section, *(["early stops"] if early_stop_cost else [])]
    if into is not None:
        for name in sections:
            report.split_at_marks(into, name)
    todo = [variant.task(file, landscape.name, seeds) for variant in variants for file, landscape in loaded]
    runs = _collect(todo, jobs, results, time_limit_s)
    rows = [row for file, landscape in loaded for row in _rows(landscape, variants, reference, runs, file)]
    tables = [report.summary_markdown(rows), *([report.early_stop_markdown(rows, DEFAULT)] if early_stop_cost else [])]
    if into is not None:
        for name, table in zip(sections, tables, strict=True):
            report.put_into(into, name, table)
    print(report.rows_as_json(rows) if as_json else "\n\n".join(tables))


def _chosen(names: str, budget: int, *, ablation: bool) -> list[str]:
    """The requested optimizers, each of which must be available; by default all available ones."""
    asked = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    chosen: list[str] = []
    for name in asked or ((DEFAULT, *ABLATIONS) if ablation else OPTIMIZERS):
        try:
            make(name, _ANY, 0, budget)
        except ValueError as error:
            if asked:
                raise ConfigError(f"--optimizers: {error}") from None
            print(f"left out: {error}", file=sys.stderr)
            continue
        chosen.append(name)
    return chosen


@dataclass(frozen=True)
class Variant:
    """One row of each table: an optimizer and how its trials are run."""

    label: str
    optimizer: str
    options: SimulationOptions

    def task(self, file: Path, landscape: str, seeds: int) -> Task:
        """All its runs on one landscape."""
        return Task(file, landscape, self.optimizer, tuple(range(seeds)), self.options)


def whole_loads_of(optimizer: str, options: SimulationOptions) -> Variant:
    """``optimizer`` with complete loads."""
    return Variant(optimizer + report.WHOLE_LOADS, optimizer, replace(options, whole_loads=True))


_Key = tuple[Path, str, str, SimulationOptions]


def _key(task: Task) -> _Key:
    return task.file, task.landscape, task.optimizer, task.options


def _collect(
    todo: Sequence[Task], jobs: int, results: Path | None, time_limit_s: float
) -> dict[_Key, list[SimulatedRun]]:
    """Every run. Long ones report progress on stderr. Exits if the time limit left some out."""
    saved = None if results is None else SavedRuns(results)
    runs: dict[_Key, list[SimulatedRun]] = {_key(task): saved.of(task) if saved else [] for task in todo}
    batches = [batch for task in todo for batch in task.batches({run.seed for run in runs[_key(task)]})]
    said = time.monotonic()
    done = 0
    for done, (task, ended) in enumerate(run_all(batches, jobs, time_limit_s), 1):
        runs[_key(task)].extend(ended)
        if saved is not None:
            saved.add(task, ended)
        if time.monotonic() - said > 5:
            said = time.monotonic()
            print(f"{done}/{len(batches)}: {task.landscape}, {task.optimizer}", file=sys.stderr, flush=True)
    if done < len(batches):
        missing = sum(len(task.seeds) - len(runs[_key(task)]) for task in todo)
        advice = "" if results is None else "; the same command runs them"
        print(f"time limit reached, {missing} runs missing{advice}", file=sys.stderr)
        raise typer.Exit(1)
    return {key: sorted(group, key=lambda run: run.seed) for key, group in runs.items()}


def _rows(
    landscape: Landscape,
    variants: Sequence[Variant],
    reference: str,
    runs: dict[_Key, list[SimulatedRun]],
    file: Path,
) -> list[SummaryRow]:
    groups = {v.label: runs[file, landscape.name, v.optimizer, v.options] for v in variants}
    known_ms = best_known([run for group in groups.values() for run in group], landscape.best_known_ms)
    return [
        replace(
            row(group, known_ms, landscape.fast_ms, groups.get(reference, []) if label != reference else []),
            optimizer=label,
        )
        for label, group in groups.items()
    ]
