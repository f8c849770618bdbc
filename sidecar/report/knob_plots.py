"""The plots of limits, knobs, crashes and time. Pure, but for the import of plotly."""

import math
from collections.abc import Sequence
from typing import Any

from sidecar.format import setting
from sidecar.record.trial import Role, TrialStatus
from sidecar.record.trial_states import TRIAL_STATES
from sidecar.report import wording
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
    trial_axis,
)
from sidecar.report.view_model import ReportView, TrialEntry
from vllm_sloguard.knobs import Knob, KnobKind, Value

_ROW_PX = 64
_BEST_SHARE = 0.25
_GOLDEN = 0.618034  # the golden ratio, whose multiples modulo 1 are evenly spread
_CRASHES = ("#dd4132", "#b5179e", "#e6a100", "#6d4c41", "#1d8a99")
_PARTS = {
    "starting": ("starting engines", "#3b82c4"),
    "warming_up": ("warming up", "#e6a100"),
    "measuring": ("measuring", "#2a9d4e"),
    "stopping": ("stopping", "#9467bd"),
    "deciding": ("deciding and other", PLAIN),
}


def limits_plot(view: ReportView) -> tuple[Figure, int] | None:
    """One row per limit: what every trial measured, and the limit."""
    names = [n for n in view.limits if any(e.measured.get(n) is not None for e in view.entries)]
    if not names:
        return None
    figure, height = new(110 + 165 * len(names), margin={"l": 64, "r": 18, "t": 34, "b": 48})
    gap = 0.075
    share = (1 - gap * (len(names) - 1)) / len(names)
    for row, name in enumerate(names):
        top = 1 - row * (share + gap)
        _limit_row(figure, view, name, row + 1, (max(top - share, 0.0), top))
    figure.update_xaxes(axis("", **trial_axis(view)), matches="x")
    figure.layout[f"xaxis{len(names) if len(names) > 1 else ''}"].title = {"text": "trial"}
    return figure, height


def _limit_row(figure: Figure, view: ReportView, name: str, row: int, domain: tuple[float, float]) -> None:
    suffix = str(row) if row > 1 else ""
    limit, rate = view.limits[name], name in wording.SHARES
    finite = [m for e in view.entries if (m := e.measured.get(name)) is not None and math.isfinite(m)]
    # Infinite: failed requests are drawn at the top.
    top = max([*finite, limit], default=limit) * (1.15 if rate else 1.6)
    low = min([m for m in finite if m > 0] + [limit]) if limit else 0.0
    log = not rate and bool(finite) and low > 0 and top > 8 * low
    for look, entries in looks(view, [e for e in view.entries if e.measured.get(name) is not None]).items():
        y = [min(e.measured[name] or 0.0, top) for e in entries]
        shown = [min(max(v, low / 1.5), top) for v in y] if log else y
        more: dict[str, Any] = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "legendgroup": look.name}
        known = {trace.name for trace in figure.data}
        text = [f"trial {e.number}: {wording.measured_text(name, e.measured[name])}" for e in entries]
        markers(figure, look, entries, shown, text, showlegend=look.name not in known, **more)
    figure.add_shape(
        type="line", xref=f"x{suffix} domain", yref=f"y{suffix}", x0=0, x1=1, y0=limit, y1=limit,
        line={"color": MISSED, "dash": "dash", "width": 1.5},
    )  # fmt: skip
    figure.add_annotation(
        text=f"{wording.LIMITS[name]}: limit {wording.measured_text(name, limit)}", xref=f"x{suffix} domain",
        yref=f"y{suffix} domain", x=0, y=1.0, xanchor="left", yanchor="bottom", showarrow=False,
    )  # fmt: skip
    scale: dict[str, Any] = {"range": [-0.08 * (top or 0.01), top or 0.01]}
    if log:
        scale = log_axis(low / 1.6, top * 1.2)
    title = "" if rate else "ms"
    more_y = {"tickformat": ".1%"} if rate else {}
    figure.layout[f"yaxis{suffix}"] = axis(title, domain=list(domain), anchor=f"x{suffix}", **scale, **more_y)
    figure.layout[f"xaxis{suffix}"] = {"anchor": f"y{suffix}"}


def knobs(view: ReportView) -> tuple[Figure, int] | None:
    """Parallel coordinates with one row per knob and one line per trial; rows keep names readable at any width."""
    rows = [knob for knob in _by_importance(view) if any(knob.name in e.knobs for e in view.entries)]
    entries = [e for e in view.entries if e.role in (Role.BASELINE, Role.SEARCH) and e.knobs]
    if not rows or len({repr(e.knobs) for e in entries}) < 2:
        return None
    figure, height = new(110 + _ROW_PX * len(rows), margin={"l": 18, "r": 18, "t": 24, "b": 48})
    axes = [_Axis(knob, [e.knobs[knob.name] for e in entries if knob.name in e.knobs]) for knob in rows]
    for name, colour, width, alike in _bundles(view, entries):
        x: list[float | None] = []
        y: list[float | None] = []
        text: list[str] = []
        for entry in alike:
            for row, knob_axis in enumerate(axes):
                given = entry.knobs.get(knob_axis.knob.name)
                x.append(None if given is None else knob_axis.place(given, entry.number))
                y.append(-row)
                text.append(str(entry.number))
            x.append(None)
            y.append(None)
            text.append("")
        figure.add_scatter(
            x=x, y=y, text=text, name=name, mode="lines+markers", marker={"size": 6 if width < 3 else 9},
            line={"color": colour, "width": width},
            opacity=0.95 if width >= 3 else min(0.55, max(25 / len(alike), 0.15)),
            hovertemplate=f"trial %{{text}} ({name})<extra></extra>",
        )  # fmt: skip
    _name_rows(figure, axes)
    figure.update_xaxes(visible=False, fixedrange=True, range=[-0.02, 1.02])
    figure.update_yaxes(range=[-len(rows) + 0.4, 0.4])
    return figure, height


def _by_importance(view: ReportView) -> list[Knob]:
    """In the order of their importance if that is known, else of the file."""
    order = list(view.importance.shares)
    return sorted(view.knobs, key=lambda knob: order.index(knob.name) if knob.name in order else len(order))


def _name_rows(figure: Figure, axes: "Sequence[_Axis]") -> None:
    """One line per knob, with its name in the margin and some of its values below."""
    figure.update_yaxes(
        tickvals=[-row for row in range(len(axes))], ticktext=[_wrapped_name(a.knob.name) for a in axes],
        showgrid=False, zeroline=False, showline=False, automargin=True, fixedrange=True,
    )  # fmt: skip
    for row, knob_axis in enumerate(axes):
        figure.add_shape(type="line", x0=0, x1=1, y0=-row, y1=-row, line={"color": PLAIN, "width": 1}, layer="below")
        for place, label in knob_axis.ticks():
            anchor = "left" if place < 0.02 else "right" if place > 0.98 else "center"
            # The page's style sheet gives the background its colour.
            low = {"yanchor": "top", "yshift": -6, "font": {"size": 11}, "bgcolor": "#fff", "borderpad": 0}
            figure.add_annotation(text=label, x=place, y=-row, xanchor=anchor, showarrow=False, **low)


def _wrapped_name(name: str) -> str:
    """In two lines if it is long: the margin is narrow on a phone."""
    if len(name) <= 14:
        return name
    middle = min((i for i, letter in enumerate(name) if letter == "_"), key=lambda i: abs(i - len(name) / 2), default=0)
    return f"{name[: middle + 1]}<br>{name[middle + 1 :]}" if middle else name


class _Axis:
    """One knob's values, from 0 to 1."""

    def __init__(self, knob: Knob, seen: Sequence[Value]) -> None:
        self.knob = knob
        self._numbers = [v for v in seen if isinstance(v, int | float) and not isinstance(v, bool)]
        self._choices: list[str] = []
        if knob.kind is KnobKind.CATEGORICAL or len(self._numbers) < len(seen):
            self._choices = list(dict.fromkeys(setting(v) for v in (*knob.choices, *seen)))
        self._low = min([knob.low, *self._numbers]) if not self._choices else 0.0
        self._high = max([knob.high, *self._numbers]) if not self._choices else 1.0
        self._log = knob.log and self._low > 0

    def place(self, given: Value, number: int | None = None) -> float:
        """The position of a value; choices are jittered by trial ``number`` so that they do not hide each other."""
        if self._choices:
            beside = 0.0 if number is None else 0.4 * (number * _GOLDEN % 1 - 0.5)
            return (self._choices.index(setting(given)) + 0.5 + beside) / len(self._choices)
        low, high, value = self._low, self._high, float(given)
        if self._log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """The positions of some values."""
        if self._choices:
            return [(self.place(choice), choice) for choice in self._choices]
        middle = math.sqrt(self._low * self._high) if self._log else (self._low + self._high) / 2
        middle = round(middle) if self.knob.kind is KnobKind.INT else middle
        return [(self.place(v), _compact(self.knob, v)) for v in (self._low, middle, self._high)]


def _compact(knob: Knob, value: float) -> str:
    if knob.name.endswith("_bytes"):
        return setting(value, knob.name)
    return f"{value:,.4g}" if value < 10000 else f"{value:,.0f}"


def _bundles(view: ReportView, entries: Sequence[TrialEntry]) -> list[tuple[str, str, float, list[TrialEntry]]]:
    """Name, colour and width of the lines, the most important ones last, on top."""
    met = sorted(
        (e for e in entries if e.status is TrialStatus.FEASIBLE and e.value is not None), key=lambda e: e.value or 0
    )
    if view.objective != "latency":
        met.reverse()
    best = {e.number for e in met[: math.ceil(len(met) * _BEST_SHARE)]}
    marked = [e for e in entries if e.role is Role.BASELINE or e.number == view.best]
    rest = [e for e in entries if e not in marked]
    sorts = (
        (
            "crashed",
            TRIAL_STATES[TrialStatus.CRASHED].colour,
            1.2,
            [e for e in rest if e.status is TrialStatus.CRASHED],
        ),
        (
            "infeasible",
            TRIAL_STATES[TrialStatus.INFEASIBLE].colour,
            1.2,
            [e for e in rest if e.status is TrialStatus.INFEASIBLE],
        ),
        (
            "feasible",
            "#7fb2dd",
            1.2,
            [e for e in rest if e.status is TrialStatus.FEASIBLE and e.number not in best],
        ),
        ("best quarter of the feasible", "#1f5f9e", 1.8, [e for e in rest if e.number in best]),
        ("incumbent", INCUMBENT, 3.0, [e for e in marked if e.role is Role.BASELINE]),
        ("candidate", CANDIDATE, 3.5, [e for e in marked if e.role is not Role.BASELINE]),
    )
    return [bundle for bundle in sorts if bundle[3]]


def importance_plot(view: ReportView) -> tuple[Figure, int] | None:
    """One bar per knob."""
    shares = view.importance.shares
    if not shares:
        return None
    figure, height = new(80 + 30 * len(shares), showlegend=False)
    figure.add_bar(
        x=list(shares.values()), y=list(shares), orientation="h", marker={"color": "#3b82c4"},
        text=[f"{share:.0%}" for share in shares.values()], textposition="outside", cliponaxis=False, hoverinfo="skip",
    )  # fmt: skip
    figure.update_xaxes(axis("importance", tickformat=".0%", range=[0, max(shares.values()) * 1.15]))
    figure.update_yaxes(axis("", autorange="reversed"))
    return figure, height


def crashes(view: ReportView) -> tuple[Figure, int] | None:
    """One row per knob: the values of the trials that crashed beside those of measured ones."""
    crashed = [e for e in view.entries if e.status is TrialStatus.CRASHED and e.knobs]
    measured = [e for e in view.entries if e.status in (TrialStatus.FEASIBLE, TrialStatus.INFEASIBLE)]
    rows = [knob for knob in _by_importance(view) if any(knob.name in e.knobs for e in crashed)]
    if len(crashed) < 2 or not rows:
        return None
    figure, height = new(110 + _ROW_PX * len(rows), margin={"l": 18, "r": 18, "t": 24, "b": 48})
    both = [*measured, *crashed]
    axes = [_Axis(knob, [e.knobs[knob.name] for e in both if knob.name in e.knobs]) for knob in rows]
    sorts = [("measured", PLAIN, "circle-open", measured)]
    for number, category in enumerate(sorted({e.category for e in crashed})):
        alike = [e for e in crashed if e.category == category]
        sorts.append((category, _CRASHES[number % len(_CRASHES)], "x", alike))
    for order, (name, colour, symbol, alike) in enumerate(sorts):
        spots = [(e, row, a) for e in alike for row, a in enumerate(axes) if a.knob.name in e.knobs]
        figure.add_scatter(
            x=[a.place(e.knobs[a.knob.name], e.number) for e, _, a in spots],
            # Crashes are drawn above the line, measured trials on it, so that neither hides the other.
            y=[-row + (0.16 + 0.05 * (e.number % 3) if order else 0.0) for e, row, _ in spots],
            mode="markers", name=name, marker={"color": colour, "symbol": symbol, "size": 8},
            text=[str(e.number) for e, _, _ in spots], hovertemplate=f"trial %{{text}}: {name}<extra></extra>",
        )  # fmt: skip
    _name_rows(figure, axes)
    figure.update_xaxes(visible=False, fixedrange=True, range=[-0.02, 1.02])
    figure.update_yaxes(range=[-len(rows) + 0.4, 0.5])
    return figure, height


def time_plot(view: ReportView) -> tuple[Figure, int] | None:
    """One bar per trial: how its time was spent."""
    spent = [e for e in view.entries if e.status is not TrialStatus.REFUSED]
    if not spent:
        return None
    figure, height = new(320, barmode="stack", bargap=0.15)
    for part, (name, colour) in _PARTS.items():
        figure.add_bar(
            x=[e.number for e in spent], y=[getattr(e.seconds, part) for e in spent], name=name,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate=f"trial %{{x}}: {name} %{{y:.1f}} s<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(axis("trial", **trial_axis(view)))
    figure.update_yaxes(axis("seconds", rangemode="tozero"))
    return figure, height
