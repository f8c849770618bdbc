"""The report's plots. Pure, but for the import of plotly."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sidecar.config.schema import Objective
from sidecar.record.trial import Role, TrialStatus
from sidecar.report import knob_plots, wording
from sidecar.report.decision_summary import Gain
from sidecar.report.plot_style import (
    CANDIDATE,
    INCUMBENT,
    PLAIN,
    Figure,
    axis,
    log_axis,
    looks,
    markers,
    new,
    trial_axis,
)
from sidecar.report.view_model import ReplicateLatencies, ReportView

_ANSWER_POINTS = 200
# Ratio of the largest to the smallest value above which an axis is logarithmic.
_FAR = 4


@dataclass(frozen=True)
class Plot:
    """A figure; ``height`` in pixels."""

    figure: Figure
    height: int


def plots(view: ReportView) -> dict[str, Plot]:
    """The plots that have something to show, by name."""
    makers: dict[str, Callable[[ReportView], tuple[Figure, int] | None]] = {
        "gain": lambda s: _gain(s.verdict.gain) if s.verdict.gain else None,
        "objective": _objective,
        "answers": _answers,
        "percentiles": _percentiles,
        "limits": knob_plots.limits_plot,
        "knobs": knob_plots.knobs,
        "importance": knob_plots.importance_plot,
        "crashes": knob_plots.crashes,
        "time": knob_plots.time_plot,
    }
    made = {name: maker(view) for name, maker in makers.items()}
    return {name: Plot(*found) for name, found in made.items() if found is not None}


def _gain(gain: Gain) -> tuple[Figure, int]:
    figure, height = new(150, showlegend=False)
    figure.add_scatter(
        x=[gain.estimate],
        y=[""],
        mode="markers",
        marker={"size": 13, "color": CANDIDATE if gain.low > 0 else PLAIN},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [gain.high - gain.estimate],
            "arrayminus": [gain.estimate - gain.low],
            "thickness": 3,
            "width": 8,
        },
        hovertemplate=f"{gain.estimate:+.1%}, from {gain.low:+.1%} to {gain.high:+.1%}<extra></extra>",
    )
    low, high = min(gain.low, 0.0), max(gain.high, gain.least)
    margin = 0.15 * (high - low)
    # Each is written on its line's far side, so that neither line, however close, crosses the other's text.
    for at, text, place in ((0.0, "no difference", "bottom left"), (gain.least, "required", "top right")):
        line = {"dash": "dot" if at else "solid", "color": PLAIN}
        figure.add_vline(x=at, line=line, annotation={"text": text}, annotation_position=place)
    figure.update_xaxes(axis("gain over the incumbent", tickformat="+.0%", range=[low - margin, high + 2 * margin]))
    figure.update_yaxes({"visible": False, "fixedrange": True})
    return figure, height


def _objective(view: ReportView) -> tuple[Figure, int] | None:
    if not any(e.value is not None for e in view.entries):
        return None
    figure, height = new(400)
    shown = [e for e in view.entries if e.value is not None]
    values = [e.value for e in shown if e.value]
    log = bool(values) and len(values) == len(shown) and max(values) > _FAR * min(values)
    floor = min(values) / 1.4 if log else 0.0
    for look, entries in looks(view, shown).items():
        markers(figure, look, entries, [e.value for e in entries])
    for look, entries in looks(view, [e for e in view.entries if e.value is None]).items():
        known = {trace.name for trace in figure.data}
        more: dict[str, Any] = {"legendgroup": look.name, "showlegend": look.name not in known}
        markers(figure, look, entries, [floor] * len(entries), **more)
    incumbents = [e.value for e in shown if e.role in (Role.BASELINE, Role.REFERENCE) and e.value is not None]
    if incumbents:
        figure.add_hline(y=sum(incumbents) / len(incumbents), line={"color": INCUMBENT, "dash": "dash", "width": 1.5})
    best = _best_so_far(view)
    if best:
        figure.add_scatter(
            x=[n for n, _ in best],
            y=[v for _, v in best],
            mode="lines",
            line={"shape": "hv", "color": CANDIDATE, "width": 1.5},
            name="best so far",
            hoverinfo="skip",
        )
    figure.update_xaxes(axis("trial", **trial_axis(view)))
    top = max(values, default=1.0)
    # What has no figure stands between the values and the axis.
    scale = log_axis(floor / 1.1, top * 1.2) if log else {"range": [-0.06 * top, 1.08 * top]}
    figure.update_yaxes(axis(wording.AXES[view.objective], **scale))
    return figure, height


def _best_so_far(view: ReportView) -> list[tuple[int, float]]:
    """The best feasible value of the search up to each trial."""
    lower, best, line = view.objective is Objective.LATENCY, None, list[tuple[int, float]]()
    for entry in view.entries:
        value = entry.value
        if entry.role is Role.SEARCH and entry.status is TrialStatus.FEASIBLE and value is not None:
            best = value if best is None else min(best, value) if lower else max(best, value)
        if best is not None and entry.role is Role.SEARCH:
            line.append((entry.number, best))
    return line


def _answers(view: ReportView) -> tuple[Figure, int] | None:
    """The distribution of E2E latency, one line per start."""
    if not any(answers for starts in view.starts for answers in starts.answers_ms):
        return None
    figure, height = new(360)
    for starts, colour in zip(view.starts, _sides(view.starts), strict=True):
        for number, (entry, answers) in enumerate(zip(starts.entries, starts.answers_ms, strict=True)):
            # What failed was never answered: such a line ends below 100 %.
            shares = [i / _ANSWER_POINTS for i in range(1, _ANSWER_POINTS + 1)] if answers else []
            figure.add_scatter(
                x=[_finite(answers[max(0, round(share * len(answers)) - 1)]) for share in shares],
                y=shares,
                mode="lines",
                line={"color": colour, "width": 1.8},
                name=starts.name,
                legendgroup=starts.name,
                showlegend=not number,
                hovertemplate=f"trial {entry.number}: %{{y:.0%}} within %{{x:,.0f}} ms<extra></extra>",
            )
    known = sorted(ms for starts in view.starts for answers in starts.answers_ms for ms in answers if _finite(ms))
    far = known and known[-1] > 10 * known[len(known) // 2] and known[0] > 0
    scale = log_axis(known[0] / 1.1, known[-1] * 1.1) if far else {"rangemode": "tozero"}
    figure.update_xaxes(axis("E2E latency, ms", **scale))
    figure.update_yaxes(axis("share of requests", tickformat=".0%", range=[0, 1.01]))
    return figure, height


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _sides(starts: Sequence[ReplicateLatencies]) -> list[str]:
    return [INCUMBENT if s.incumbent else CANDIDATE for s in starts]


def _percentiles(view: ReportView) -> tuple[Figure, int] | None:
    """What each start measured for each limit, as a share of the limit."""
    names = [n for n in view.limits if any(e.measured.get(n) is not None for s in view.starts for e in s.entries)]
    if not names:
        return None
    figure, height = new(120 + 52 * len(names))
    for starts, colour in zip(view.starts, _sides(view.starts), strict=True):
        ours = colour == INCUMBENT
        rows = [
            (row, entry, name, measured)
            for row, name in enumerate(names)
            for entry in starts.entries
            if (measured := entry.measured.get(name)) is not None and math.isfinite(measured) and view.limits[name]
        ]
        figure.add_scatter(
            x=[measured / view.limits[name] for _, _, name, measured in rows],
            # The incumbent is drawn above the line, the candidate below it, so that neither hides the other.
            y=[row + (-0.13 if ours else 0.13) for row, _, _, _ in rows],
            mode="markers",
            name=starts.name,
            marker={"color": colour, "symbol": "square" if ours else "star", "size": 10, "opacity": 0.85},
            text=[
                f"trial {entry.number}: {wording.measured_text(name, measured)}" for _, entry, name, measured in rows
            ],
            hovertemplate="%{text}<extra></extra>",
            cliponaxis=False,
        )
    figure.add_vline(x=1, line={"color": "#dd4132", "dash": "dash"})
    figure.update_xaxes(axis("share of the limit", tickformat=".0%", rangemode="tozero"))
    ticks = {"tickvals": list(range(len(names))), "ticktext": [_short(name) for name in names]}
    figure.update_yaxes(axis("", range=[len(names) - 0.5, -0.5], **ticks))
    return figure, height


def _short(name: str) -> str:
    return wording.LIMITS[name].replace(" ", "<br>")
