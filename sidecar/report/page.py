"""The report as one HTML page without references to the network or other files."""

import json
import math
from functools import cache
from importlib.resources import files
from typing import Any

from sidecar.config.schema import Objective
from sidecar.record.trial import Role, TrialStatus
from sidecar.record.trial_states import TRIAL_STATES
from sidecar.report import wording
from sidecar.report.plots import plots
from sidecar.report.view_model import ReportView, TrialEntry

# A longer table scrolls in a box of its own; in print it has the incumbent, the candidate and the best.
_ROWS_IN_VIEW = 30
_PRINTED = 12
# Of the figures of plots; more can't be seen.
_DIGITS = 5


def report_page(view: ReportView) -> str:
    """The page. Text from outside is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["trials"] = wording.trial_numbers
    template = environment.from_string(_file("page.html"))
    drawn = plots(view)
    figures = {name: _rounded(json.loads(plot.figure.to_json() or "{}")) for name, plot in drawn.items()}
    printed = _printed(view)
    return template.render(
        view=view,
        contents=_contents(view, set(drawn)),
        states=TRIAL_STATES.values(),
        objective=wording.OBJECTIVES[view.objective],
        unit=wording.UNITS[view.objective],
        rows=[_row(view, entry, printed=entry.number in printed) for entry in view.entries],
        columns=_columns(view),
        limits=list(view.limits),
        scrolls=len(view.entries) > _ROWS_IN_VIEW,
        unprinted=len(view.entries) - len(printed),
        plots={name: plot.height for name, plot in drawn.items()},
        figures=_script(figures),
        plotly=_file("plotly-basic.min.js"),
    )


@cache
def _file(name: str) -> str:
    return files("sidecar.report").joinpath(name).read_text(encoding="utf-8")


def _contents(view: ReportView, drawn: set[str]) -> list[tuple[str, str]]:
    """The sections that the page has, by id."""
    sections = {
        "evidence": ("What the decision rests on", bool(view.verdict.gain or view.verdict.checks)),
        "trials": ("Every trial", True),
        "objective": ("Objective by trial", "objective" in drawn),
        "latencies": ("Incumbent and candidate", bool({"answers", "percentiles"} & drawn)),
        "capacity": ("Capacity", "capacity" in drawn),
        "limits": ("Trials against the limits", "limits" in drawn),
        "knobs": ("Configurations tried", "knobs" in drawn),
        "importance": ("Knob importance", bool(view.entries)),
        "crashes": ("Crashes", bool(view.crashes)),
        "time": ("Where the time went", "time" in drawn),
        "repairs": ("Repairs and refusals", bool(view.entries)),
        "versions": ("Versions and hardware", True),
        "commands": ("Commands", True),
        "words": ("Glossary", True),
    }
    return [(name, title) for name, (title, there) in sections.items() if there]


def _rounded(content: Any) -> Any:
    """With numbers of _DIGITS significant digits."""
    if isinstance(content, float):
        return float(f"{content:.{_DIGITS}g}")
    if isinstance(content, list):
        return [_rounded(part) for part in content]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(content, dict):
        return {name: _rounded(part) for name, part in content.items()}  # pyright: ignore[reportUnknownVariableType]
    return content


def _printed(view: ReportView) -> set[int]:
    """The trials on paper: all if they are few, else the compared ones and the best of the search."""
    if len(view.entries) <= _ROWS_IN_VIEW:
        return {entry.number for entry in view.entries}
    search = [e for e in view.entries if e.role is Role.SEARCH and e.status is TrialStatus.FEASIBLE and e.value]
    search.sort(key=lambda e: e.value or 0.0, reverse=view.objective is not Objective.LATENCY)
    fixed = {e.number for e in view.entries if e.role is Role.BASELINE or e.number == view.best}
    return fixed | {e.number for e in search[:_PRINTED]}


def _columns(view: ReportView) -> list[tuple[str, str, str]]:
    """Class, title and limit."""
    limits = [
        ("number", wording.LIMITS[name], wording.measured_text(name, limit)) for name, limit in view.limits.items()
    ]
    first = [("number", "trial", ""), ("", "role", ""), ("", "state", "")]
    return [*first, ("number", wording.OBJECTIVES[view.objective], ""), *limits, ("number", "took", "")]


def _script(content: Any) -> str:
    """JSON for a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _row(view: ReportView, entry: TrialEntry, *, printed: bool) -> dict[str, Any]:
    sign = "≥ " if entry.bound else ""
    kind = "incumbent" if entry.role in (Role.BASELINE, Role.REFERENCE) else ""
    if entry.role is Role.VALIDATION or entry.number == view.best:
        kind = "candidate"
    cells: list[dict[str, Any]] = []
    for name, limit in view.limits.items():
        measured = entry.measured.get(name)
        shown = "-" if measured is None else f"{sign if measured else ''}{wording.measured_text(name, measured)}"
        cells.append(
            {"title": wording.LIMITS[name], "text": shown, "missed": measured is not None and measured > limit}
        )
    return {
        "entry": entry,
        "printed": printed,
        "sort_keys": json.dumps(_rounded(_sort_keys(view, entry)), separators=(",", ":")),
        "kind": kind,
        "role": wording.ROLES[entry.role],
        "status": TRIAL_STATES[entry.status].label,
        "value": "-"
        if entry.value is None
        else wording.with_unit(entry.value, view.objective, at_least=entry.value_is_lower_bound),
        "cells": cells,
    }


def _sort_keys(view: ReportView, entry: TrialEntry) -> list[float | str | None]:
    """By column; None sorts last, and stands for infinity, too."""
    measured = [entry.measured.get(name) for name in view.limits]
    numbers = (entry.value, *measured, entry.seconds.total)
    value, *rest = (n if n is None or math.isfinite(n) else None for n in numbers)
    return [entry.number, wording.ROLES[entry.role], TRIAL_STATES[entry.status].label, value, *rest]
