"""The command `sloguard dev bench`."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sidecar.bench import report
from sidecar.bench.landscape import Landscape, load_landscapes
from sidecar.bench.parallel import Task, run_all, tasks
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
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
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
    options = SimulationOptions(budget, guarded=not no_guard, whole_loads=whole_loads)
    loaded = [(file, landscape) for file in files for landscape in load_landscapes(file, only or None).values()]
    todo = [
        task
        for file, landscape in loaded
        for name in chosen
        for task in tasks(file, landscape.name, name, seeds, options)
    ]
    section = ("ablation" if ablation else "optimizers") + (" without the guard" if no_guard else "")
    if into is not None:
        report.split_at_marks(into, section)
    runs = _collect(todo, jobs)
    rows = [made for file, landscape in loaded for made in _rows(landscape, chosen, reference, runs, file)]
    if into is not None:
        report.put_into(into, section, report.summary_markdown(rows))
    print(report.rows_as_json(rows) if as_json else report.summary_markdown(rows))


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


_Key = tuple[Path, str, str]


def _collect(todo: Sequence[Task], jobs: int) -> dict[_Key, list[SimulatedRun]]:
    """Every run, by file, landscape and optimizer. Long ones report progress on stderr."""
    runs: dict[_Key, list[SimulatedRun]] = {}
    said = time.monotonic()
    for done, (task, ended) in enumerate(run_all(todo, jobs), 1):
        runs.setdefault((task.file, task.landscape, task.optimizer), []).extend(ended)
        if time.monotonic() - said > 5:
            said = time.monotonic()
            print(f"{done}/{len(todo)}: {task.landscape}, {task.optimizer}", file=sys.stderr, flush=True)
    return {key: sorted(group, key=lambda run: run.seed) for key, group in runs.items()}


def _rows(
    landscape: Landscape, chosen: Sequence[str], reference: str, runs: dict[_Key, list[SimulatedRun]], file: Path
) -> list[SummaryRow]:
    groups = {name: runs[file, landscape.name, name] for name in chosen}
    known_ms = best_known([run for group in groups.values() for run in group], landscape.best_known_ms)
    return [
        row(group, known_ms, landscape.fast_ms, groups.get(reference, []) if name != reference else [])
        for name, group in groups.items()
    ]
