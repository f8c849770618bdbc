"""The command `sloguard dev study`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from sidecar.bench import published_study
from sidecar.bench.published_study import Spread, StudyComparison, Summary
from sidecar.cli.rendering import print_json

study_app = typer.Typer(no_args_is_help=True)
_DIGITS = {"fast": 2, "consistency": 3, "best_ms": 2}
_TITLES = {"fast": "fast trials", "consistency": "consistency after the first", "best_ms": "best latency, ms"}


@study_app.callback()
def command() -> None:
    """Compute statistics of studies in the published format."""


@study_app.command()
def stats(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with <optimizer>_seed<n>/results.jsonl.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Compare fast trials (mean latency under a second), consistency and best latency, with Mann-Whitney tests.

    Example: sloguard dev study stats slo_guard_published/concurrent
    """
    runs = published_study.read_runs(folder)
    summaries = [published_study.summary(name, found) for name, found in sorted(runs.items())]
    compared = published_study.comparisons(runs)
    if as_json:
        rows = {"optimizers": [*map(dataclasses.asdict, summaries)], "tests": [*map(dataclasses.asdict, compared)]}
        print_json(rows)
        return
    for line in _table(summaries, compared):
        print(f"| {' | '.join(line)} |")


def _table(summaries: list[Summary], compared: list[StudyComparison]) -> list[list[str]]:
    lines = [["metric", *(s.optimizer for s in summaries), "test"], ["---"] * (len(summaries) + 2)]
    for metric, digits in _DIGITS.items():
        cells = [_cell(getattr(s, metric), digits) for s in summaries]
        lines.append([_TITLES[metric], *cells, "; ".join(_test(c) for c in compared if c.metric == metric) or "-"])
    lines.append(["feasible", *(f"{s.feasible}/{s.trials}" for s in summaries), ""])
    lines.append(["crashed", *(str(s.crashed) for s in summaries), ""])
    lines.append(["runs", *(str(s.runs) for s in summaries), ""])
    return lines


def _cell(spread: Spread | None, digits: int) -> str:
    return "-" if spread is None else f"{spread.mean:.{digits}f} ± {spread.sd:.{digits}f}"


def _test(c: StudyComparison) -> str:
    tighter = f", {c.tighter:.1f} times tighter" if c.tighter is not None else ""
    return f"{c.optimizer} against {c.baseline}: p = {c.p_better:.3f} one-sided, {c.p_two_sided:.3f} two-sided{tighter}"
