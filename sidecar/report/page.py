"""The story as one HTML page that needs nothing else: no network, no other file."""

import json
from importlib.resources import files
from typing import Any

from sidecar.record.trial import Role
from sidecar.report import wording
from sidecar.report.plots import plots
from sidecar.report.view_model import ReportView, TrialEntry

# A longer table scrolls in a box of its own; in print it is whole.
_ROWS_IN_VIEW = 30


def report_page(story: ReportView) -> str:
    """The page. Every text in it that came from outside is escaped."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs]

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["trials"] = wording.trial_numbers
    template = environment.from_string(files("sidecar.report").joinpath("page.html").read_text(encoding="utf-8"))
    drawn = plots(story)
    return template.render(
        story=story,
        words=wording,
        objective=wording.OBJECTIVES[story.objective],
        unit=wording.UNITS[story.objective],
        rows=[_row(story, entry) for entry in story.entries],
        limits=[
            (name, wording.LIMITS[name], wording.measured_text(name, limit)) for name, limit in story.limits.items()
        ],
        scrolls=len(story.entries) > _ROWS_IN_VIEW,
        plots={name: plot.height for name, plot in drawn.items()},
        figures=_script({name: json.loads(plot.figure.to_json() or "{}") for name, plot in drawn.items()}),
        plotly=get_plotlyjs(),
    )


def _script(content: Any) -> str:
    """JSON that can stand in a script: nothing in it ends the element, or begins a comment."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _row(story: ReportView, entry: TrialEntry) -> dict[str, Any]:
    sign = "≥ " if entry.bound else ""
    kind = "incumbent" if entry.role in (Role.BASELINE, Role.REFERENCE) else ""
    if entry.role is Role.VALIDATION or entry.number == story.best:
        kind = "candidate"
    cells: list[dict[str, Any]] = []
    for name, limit in story.limits.items():
        measured = entry.measured.get(name)
        shown = "-" if measured is None else f"{sign if measured else ''}{wording.measured_text(name, measured)}"
        cells.append(
            {"title": wording.LIMITS[name], "text": shown, "missed": measured is not None and measured > limit}
        )
    return {
        "entry": entry,
        "kind": kind,
        "role": wording.ROLES[entry.role],
        "status": wording.STATUSES[entry.status],
        "value": "-" if entry.value is None else wording.with_unit(entry.value, story.objective),
        "cells": cells,
    }
