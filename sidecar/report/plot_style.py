"""What all plots share. The colours of text and grid are in the CSS of the page."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

from sidecar.record.trial import Role, TrialStatus
from sidecar.record.trial_states import TRIAL_STATES
from sidecar.report import wording
from sidecar.report.view_model import ReportView, TrialEntry

Figure: TypeAlias = Any  # plotly.graph_objects.Figure, which has no types

INCUMBENT, CANDIDATE, PLAIN = "#9467bd", "#2a9d4e", "#8a8f98"
MISSED = "#dd4132"  # a limit


# Characters of a configuration or a note in a hover text; the table of trials has all of it.
_HOVER = 120


@dataclass(frozen=True)
class Look:
    """How one group of trials is drawn."""

    name: str
    colour: str
    symbol: str


_SYMBOLS = {
    TrialStatus.FEASIBLE: "circle",
    TrialStatus.INFEASIBLE: "triangle-up",
    TrialStatus.CRASHED: "x",
    TrialStatus.REFUSED: "diamond-open",
    TrialStatus.ABORTED: "circle-open",
    TrialStatus.RUNNING: "hourglass",
}


def new(height: int, **layout: Any) -> tuple[Figure, int]:
    """An empty figure, and its height in pixels."""
    from plotly import graph_objects  # pyright: ignore[reportMissingTypeStubs]

    base: dict[str, Any] = {
        "template": "none",
        "height": height,
        "margin": {"l": 64, "r": 18, "t": 14, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hovermode": "closest",
        "dragmode": False,
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    }
    return graph_objects.Figure(layout=base | layout), height


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis that touching it on a phone does not move."""
    return {"title": {"text": title}, "fixedrange": True, "zeroline": False, "automargin": True, **more}


def hover(entry: TrialEntry) -> str:
    """The hover text of a trial, escaped: it may come from logs, and plotly interprets markup."""
    lines = [f"trial {entry.number} ({wording.ROLES[entry.role]}): {TRIAL_STATES[entry.status].label}"]
    lines += [textwrap.shorten(part, _HOVER, placeholder="…") for part in (entry.configuration, entry.note) if part]
    return "<br>".join(escape(piece) for line in lines for piece in _wrapped(line))


def _wrapped(text: str, columns: int = 70) -> list[str]:
    return textwrap.wrap(text, columns) or [""]


def looks(view: ReportView, entries: Iterable[TrialEntry]) -> dict[Look, list[TrialEntry]]:
    """The entries by how they are drawn; the incumbent and the candidate have styles of their own."""
    incumbent = Look("incumbent", INCUMBENT, "square")
    candidate = Look("candidate", CANDIDATE, "star")
    found: dict[Look, list[TrialEntry]] = {}
    for entry in entries:
        state = TRIAL_STATES[entry.status]
        look = Look(state.label, state.colour, _SYMBOLS[entry.status])
        if entry.status in (TrialStatus.FEASIBLE, TrialStatus.INFEASIBLE):
            if entry.role in (Role.BASELINE, Role.REFERENCE):
                look = incumbent
            elif entry.role is Role.VALIDATION or entry.number == view.best:
                look = candidate
        found.setdefault(look, []).append(entry)
    return found


def markers(
    figure: Figure, look: Look, entries: Sequence[TrialEntry], y: Sequence[Any], text: Sequence[str] = (), **more: Any
) -> None:
    """Adds trials of one style at the heights ``y``; loads that were stopped early have open marks."""
    symbols = [f"{look.symbol}-open" if e.bound and not look.symbol.endswith("open") else look.symbol for e in entries]
    figure.add_scatter(
        x=[e.number for e in entries],
        y=y,
        mode="markers",
        name=look.name,
        marker={"color": look.colour, "symbol": symbols, "size": 11 if look.symbol == "star" else 9},
        text=text or [hover(e) for e in entries],
        hovertemplate="%{text}<extra></extra>",
        cliponaxis=False,
        **more,
    )


def trial_axis(view: ReportView) -> dict[str, Any]:
    """Trials from left to right."""
    last = max((e.number for e in view.entries), default=1)
    step: dict[str, Any] = {"dtick": 1} if last <= 12 else {"tickformat": "d", "nticks": 10}
    return {"range": [0.3, last + 0.7], **step}


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis with labels in plain numbers: plotly's own omit the powers of ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 2.5
    ticks = [digit * 10.0**decade for decade in decades for digit in ((1,) if wide else (1, 2, 5))]
    ticks = [tick for tick in ticks if low <= tick <= high]
    labels = [f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in ticks]
    return {"type": "log", "range": [math.log10(low), math.log10(high)], "tickvals": ticks, "ticktext": labels}


def percent_ticks(scale: dict[str, Any]) -> dict[str, Any]:
    """A logarithmic axis of shares, labelled in percent."""
    ticks = [100 * value for value in scale["tickvals"]]
    return {**scale, "ticktext": [f"{tick:,.0f}%" if tick >= 1 else f"{tick:.3g}%" for tick in ticks]}
