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
    MISSED,
    PLAIN,
    Figure,
    axis,
    log_axis,
    looks,
    markers,
    new,
    percent_ticks,
    trial_axis,
)
from sidecar.report.view_model import ReplicateLatencies, ReportView, TrialEntry
from vllm_sloguard.latency import nearest_rank, percentile

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
        "capacity": _capacity,
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
    for look, entries in looks(view, shown).items():
        markers(figure, look, entries, [e.value for e in entries])
    scale, aside = _scale(values or [1.0], log=log, lower_is_better=view.objective is Objective.LATENCY)
    if unmeasured := [e for e in view.entries if e.value is None]:
        _aside(figure, view, unmeasured, aside)
    _levels(figure, view, shown)
    figure.update_xaxes(axis("trial", **trial_axis(view)))
    figure.update_yaxes(axis(wording.AXES[view.objective], **scale))
    return figure, height


def _scale(values: Sequence[float], *, log: bool, lower_is_better: bool) -> tuple[dict[str, Any], float]:
    """The axis, and where on it trials without a value stand: on the worse side of all others."""
    low, top = min(values), max(values)
    if log:
        aside = top * 1.5 if lower_is_better else low / 1.5
        return log_axis(min(low / 1.2, aside / 1.2), max(top * 1.2, aside * 1.2)), aside
    if lower_is_better:
        return {"range": [-0.02 * top, 1.2 * top]}, 1.12 * top
    return {"range": [-0.16 * top, 1.08 * top]}, -0.09 * top


def _aside(figure: Figure, view: ReportView, entries: Sequence[TrialEntry], at: float) -> None:
    """Marks of trials without a value, beyond a line that says so."""
    known = {trace.name for trace in figure.data}
    for look, alike in looks(view, entries).items():
        more: dict[str, Any] = {"legendgroup": look.name, "showlegend": look.name not in known}
        markers(figure, look, alike, [at] * len(alike), **more)
    figure.add_hline(y=at, line={"color": PLAIN, "dash": "dot", "width": 1}, layer="below")


def _levels(figure: Figure, view: ReportView, shown: Sequence[TrialEntry]) -> None:
    """The mean of the incumbent, and the best feasible trial up to each point."""
    incumbents = [e.value for e in shown if e.role in (Role.BASELINE, Role.REFERENCE) and e.value is not None]
    if incumbents:
        figure.add_hline(y=sum(incumbents) / len(incumbents), line={"color": INCUMBENT, "dash": "dash", "width": 1.5})
    if best := _best_so_far(view):
        figure.add_scatter(
            x=[n for n, _ in best], y=[v for _, v in best], mode="lines", name="best until then", hoverinfo="skip",
            line={"shape": "hv", "color": CANDIDATE, "width": 1.5},
        )  # fmt: skip


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
    """The distribution of E2E latency, one line per start, with the p99 of each side."""
    if not any(answers for starts in view.starts for answers in starts.answers_ms):
        return None
    figure, height = new(380)
    for starts, colour in zip(view.starts, _sides(view.starts), strict=True):
        pooled = sorted(ms for answers in starts.answers_ms for ms in answers)
        if not pooled:
            continue
        p99 = percentile(pooled, 0.99) or math.inf
        name = f"{starts.name}: p99 {wording.measured_text('e2e_p99_ms', p99)}, n = {len(pooled):,}"
        _distributions(figure, starts, colour, name)
        if math.isfinite(p99):
            figure.add_scatter(
                x=[p99], y=[0.99], mode="markers", legendgroup=starts.name, showlegend=False,
                marker={"color": colour, "symbol": "diamond", "size": 11},
                hovertemplate=f"{name}<extra></extra>",
            )  # fmt: skip
    limit = view.limits.get("e2e_p99_ms")
    known = sorted(ms for starts in view.starts for answers in starts.answers_ms for ms in answers if _finite(ms))
    if not known:
        return None
    most = max(known[-1], limit or 0.0)
    if limit is not None:
        figure.add_vline(x=limit, line={"color": MISSED, "dash": "dash"}, annotation={"text": "limit of the p99"})
    # All far from the limit, or spread over decades.
    far = known[0] > 0 and most > _FAR * known[len(known) // 2]
    scale = log_axis(known[0] / 1.1, most * 1.3) if far else {"rangemode": "tozero"}
    figure.update_xaxes(axis("E2E latency, ms", **scale))
    figure.update_yaxes(axis("share of requests", tickformat=".0%", range=[0, 1.03]))
    return figure, height


def _distributions(figure: Figure, starts: ReplicateLatencies, colour: str, name: str) -> None:
    """A line ends below 100% if requests failed."""
    shares = [i / _ANSWER_POINTS for i in range(1, _ANSWER_POINTS + 1)]
    for number, (entry, answers) in enumerate(zip(starts.entries, starts.answers_ms, strict=True)):
        figure.add_scatter(
            x=[_finite(answers[nearest_rank(len(answers), share) - 1]) for share in shares if answers],
            y=shares if answers else [],
            mode="lines",
            line={"color": colour, "width": 1.8},
            name=name,
            legendgroup=starts.name,
            showlegend=not number,
            hovertemplate=f"trial {entry.number}: %{{y:.1%}} within %{{x:,.0f}} ms<extra></extra>",
        )


def _capacity(view: ReportView) -> tuple[Figure, int] | None:
    """The largest share of a limit over the request rate, one line per trial with loads at several rates."""
    entries = [e for e in view.entries if len({load.rate for load in e.rates}) > 1]
    if not entries:
        return None
    figure, height = new(360)
    known = any(load.worst is not None for e in entries for load in e.rates)
    for look, alike in looks(view, entries).items():
        for number, entry in enumerate(alike):
            loads = sorted((load for load in entry.rates if (load.worst is not None) is known), key=lambda x: x.rate)
            figure.add_scatter(
                x=[load.rate for load in loads],
                y=[load.worst if known else entry.number for load in loads],
                mode="lines+markers",
                name=look.name,
                legendgroup=look.name,
                showlegend=not number,
                line={"color": look.colour, "width": 3 if look.name in ("incumbent", "candidate") else 1},
                marker={"color": look.colour, "symbol": ["circle" if load.met else "x-open" for load in loads]},
                opacity=1.0 if look.name in ("incumbent", "candidate") else 0.45,
                hovertemplate=f"trial {entry.number}: %{{x:.3g}} requests/s<extra></extra>",
            )
    figure.update_xaxes(axis("request rate, requests/s", rangemode="tozero"))
    if not known:
        figure.update_yaxes(axis("trial", **trial_axis(view)))
        return figure, height
    shares = [load.worst for e in entries for load in e.rates if load.worst and math.isfinite(load.worst)]
    figure.add_hline(y=1, line={"color": MISSED, "dash": "dash"})
    scale = log_axis(min([*shares, 1.0]) / 1.2, max([*shares, 1.0]) * 1.2)
    figure.update_yaxes(axis("largest share of a limit", **percent_ticks(scale)))
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
    shares = [share for starts in view.starts for *_, share in _shares(view, starts, names) if share]
    log = bool(shares) and min(shares) < 1 / _FAR
    floor = min(shares, default=1.0) / 1.3
    for starts, colour in zip(view.starts, _sides(view.starts), strict=True):
        ours, rows = colour == INCUMBENT, _shares(view, starts, names)
        figure.add_scatter(
            x=[max(share, floor) if log else share for *_, share in rows],
            # The incumbent is drawn above the line, the candidate below it, so that neither hides the other.
            y=[row + (-0.13 if ours else 0.13) for row, *_ in rows],
            mode="markers",
            name=starts.name,
            marker={"color": colour, "symbol": "square" if ours else "star", "size": 10, "opacity": 0.85},
            text=[f"trial {e.number}: {wording.measured_text(name, e.measured[name])}" for _, e, name, _ in rows],
            hovertemplate="%{text}<extra></extra>",
            cliponaxis=False,
        )
    figure.add_vline(x=1, line={"color": MISSED, "dash": "dash"})
    most = max([*shares, 1.0])
    scale = {"tickformat": ".0%", "range": [-0.03 * most, 1.05 * most]}
    if log:
        scale = percent_ticks(log_axis(floor / 1.1, most * 1.2))
    figure.update_xaxes(axis("share of the limit", **scale))
    ticks = {"tickvals": list(range(len(names))), "ticktext": [_short(name) for name in names]}
    figure.update_yaxes(axis("", range=[len(names) - 0.5, -0.5], **ticks))
    return figure, height


def _shares(
    view: ReportView, starts: ReplicateLatencies, names: Sequence[str]
) -> list[tuple[int, TrialEntry, str, float]]:
    return [
        (row, entry, name, measured / view.limits[name])
        for row, name in enumerate(names)
        for entry in starts.entries
        if (measured := entry.measured.get(name)) is not None and math.isfinite(measured) and view.limits[name]
    ]


def _short(name: str) -> str:
    return wording.LIMITS[name].replace(" ", "<br>")
