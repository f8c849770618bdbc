"""The report as one HTML page without references to the network or other files."""

import json
from importlib.resources import files
from typing import Any

from sidecar.record.trial import Role
from sidecar.record.trial_states import TRIAL_STATES
from sidecar.report import wording
from sidecar.report.plots import plots
from sidecar.report.view_model import ReportView, TrialEntry

# A longer table scrolls in a box of its own; in print it is complete.
_ROWS_IN_VIEW = 30


def report_page(view: ReportView) -> str:
    """The page. Text from outside is escaped."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs]

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["trials"] = wording.trial_numbers
    template = environment.from_string(files("sidecar.report").joinpath("page.html").read_text(encoding="utf-8"))
    drawn = plots(view)
    return template.render(
        view=view,
        states=TRIAL_STATES.values(),
        objective=wording.OBJECTIVES[view.objective],
        unit=wording.UNITS[view.objective],
        rows=[_row(view, entry) for entry in view.entries],
        limits=[
            (name, wording.LIMITS[name], wording.measured_text(name, limit)) for name, limit in view.limits.items()
        ],
        scrolls=len(view.entries) > _ROWS_IN_VIEW,
        plots={name: plot.height for name, plot in drawn.items()},
        figures=_script({name: json.loads(plot.figure.to_json() or "{}") for name, plot in drawn.items()}),
        plotly=get_plotlyjs(),
    )


def _script(content: Any) -> str:
    """JSON for a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _row(view: ReportView, entry: TrialEntry) -> dict[str, Any]:
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
        "kind": kind,
        "role": wording.ROLES[entry.role],
        "status": TRIAL_STATES[entry.status].label,
        "value": "-"
        if entry.value is None
        else wording.with_unit(entry.value, view.objective, at_least=entry.value_is_lower_bound),
        "cells": cells,
    }
