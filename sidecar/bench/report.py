"""Renders rows as JSON and Markdown tables, and places a table in a file."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from sidecar.bench.landscape import LandscapeError
from sidecar.bench.summary import SummaryRow

# After an optimizer's name: the same with complete loads.
WHOLE_LOADS = ", whole loads"
_Cell = tuple[str, Callable[[SummaryRow], str]]


def rows_as_json(rows: Sequence[SummaryRow]) -> str:
    """A JSON list with one object per row."""
    return json.dumps([dataclasses.asdict(row) for row in rows], allow_nan=False)


def summary_markdown(rows: Sequence[SummaryRow]) -> str:
    """One table per landscape."""
    blocks = [_table(name, list(group)) for name, group in groupby(rows, key=lambda row: row.landscape)]
    return "\n\n".join(blocks)


def early_stop_markdown(rows: Sequence[SummaryRow], optimizer: str) -> str:
    """What early stops cost and save ``optimizer``: one line per landscape, against its own complete loads."""
    head = ["landscape", "found", "served latency against complete loads", "measured seconds of theirs"]
    head += ["meets the SLO again", "crashes"]
    lines: list[list[str]] = []
    against = ""
    for name, group in groupby(rows, key=lambda row: row.landscape):
        by_name = {row.optimizer: row for row in group}
        ours, whole = by_name[optimizer], by_name[optimizer + WHOLE_LOADS]
        served = None
        if ours.served_median is not None and whole.served_median:
            served = ours.served_median / whole.served_median - 1
        meets = "-" if ours.served_feasible is None else f"{ours.served_feasible:.1%}"
        seconds = ours.measured_s_mean / whole.measured_s_mean if whole.measured_s_mean else None
        line = [name, f"{ours.found}/{ours.seeds}", "-" if served is None else f"{served:+.1%}"]
        line += ["-" if seconds is None else f"{seconds:.0%}", meets, f"{ours.crashes_mean:.2f}"]
        if ours.against:
            against = ours.against
            line.append("-" if ours.p is None else f"{ours.p:.2g}")
        lines.append(line)
    head += [f"p against {against}"] if against else []
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _table(name: str, rows: Sequence[SummaryRow]) -> str:
    against = next((row.against for row in rows if row.against), None)
    cells: list[_Cell] = [
        ("optimizer", lambda r: r.optimizer),
        ("found", lambda r: f"{r.found}/{r.seeds}"),
        ("first", lambda r: four_digits(r.first_feasible_median)),
        ("crashes", lambda r: f"{r.crashes_mean:.2f}"),
        ("feasible", lambda r: f"{r.feasible_mean:.1f}"),
        ("best, ms", lambda r: f"{four_digits(r.best_median)} ± {four_digits(r.best_std)}"),
        ("regret", lambda r: "-" if r.regret is None else f"{r.regret:+.1%}"),
        ("served regret", lambda r: "-" if r.regret_served is None else f"{r.regret_served:+.1%}"),
        ("served, ms", lambda r: four_digits(r.served_median)),
        ("served meets", lambda r: "-" if r.served_feasible is None else f"{r.served_feasible:.0%}"),
        ("measured, s", lambda r: f"{r.measured_s_mean:.0f}"),
        ("time, s", lambda r: f"{r.cost_s_mean:.0f}"),
    ]
    if any(row.fast_mean is not None for row in rows):
        cells.append(("fast", lambda r: "-" if r.fast_mean is None else f"{r.fast_mean:.1f}"))
        cells.append(("consistency", lambda r: "-" if r.consistency_mean is None else f"{r.consistency_mean:.2f}"))
    if against:
        cells.append((f"p against {against}", lambda r: "-" if r.p is None else f"{r.p:.2g}"))
        cells.append(("A12", lambda r: "-" if r.a12 is None else f"{r.a12:.2f}"))
    lines = [[head for head, _ in cells], ["---"] * len(cells), *([show(row) for _, show in cells] for row in rows)]
    return f"### {name}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def four_digits(value: float | None) -> str:
    """Four significant digits, or all digits before the decimal point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def marks(section: str) -> tuple[str, str]:
    """The marker lines around a section's table."""
    return f"<!-- bench {section}: begin -->", f"<!-- bench {section}: end -->"


def split_at_marks(path: Path, section: str) -> tuple[str, str]:
    """The text before and after the section. Raises LandscapeError if ``path`` lacks the markers."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    begin, end = marks(section)
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise LandscapeError(f"{path}: needs the lines {begin} and {end}, between which the table goes")
    return before, after


def put_into(path: Path, section: str, text: str) -> None:
    """Replaces the text between the section's markers in ``path``. Raises LandscapeError."""
    begin, end = marks(section)
    before, after = split_at_marks(path, section)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
