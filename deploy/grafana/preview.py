"""Draws the dashboards without Grafana: runs the queries of every panel, and writes one page per dashboard.

It shows data, titles, units and legends, not Grafana's looks.
"""

import argparse
import html
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import count, groupby
from pathlib import Path
from typing import Any

from dashboard_queries import DASHBOARDS, Series, Variables, marks, panels, series

_ROW_PX = 38
_COLORS = {
    "green": "#56a64b",
    "dark-green": "#19730e",
    "yellow": "#e0b400",
    "red": "#e02f44",
    "blue": "#3274d9",
    "light-blue": "#8ab8ff",
    "orange": "#ff780a",
    "purple": "#a352cc",
    "super-light-purple": "#deb6f2",
    "gray": "#8e8e8e",
}
_STYLE = """body{font:13px sans-serif;margin:12px;background:#f4f5f5}
h1{font-size:20px} h2{font-size:15px;margin:6px 0 0}
.grid{display:grid;grid-template-columns:repeat(24,1fr);gap:6px}
.panel{background:#fff;border:1px solid #ddd;padding:4px 6px;overflow:hidden}
.title{font-weight:600}.about{color:#666;font-size:11px}.none{color:#b00}
.stat{font-size:30px;text-align:center;margin-top:18px}.stat span{padding:4px 14px;display:inline-block}
.stat small{display:block;font-size:12px;color:#666}
table{border-collapse:collapse;font-size:12px}td{border-bottom:1px solid #eee;padding:1px 8px 1px 0}"""


@dataclass(frozen=True)
class Shown:
    """The Prometheus server and the time range, in seconds since the epoch."""

    url: str
    start: float
    end: float
    step_s: float
    variables: Variables


@dataclass(frozen=True)
class Line:
    """One series with its name in the legend."""

    name: str
    data: Series


def page(path: Path, shown: Shown) -> str:
    """The dashboard at ``path`` as a self-contained page."""
    from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    title = json.loads(path.read_text(encoding="utf-8"))["title"]
    regions = list(_regions(path, shown))
    cells = "".join(_cell(panel, shown, regions) for panel in panels(path))
    head = f"<meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script>"
    return f"<!doctype html>{head}<h1>{html.escape(title)}</h1><div class=grid>{cells}</div>"


def _cell(panel: dict[str, Any], shown: Shown, regions: list[tuple[float, float, str]]) -> str:
    place, title = panel["gridPos"], html.escape(panel["title"])
    if panel["type"] == "row":
        return f'<h2 style="grid-column:span 24">{title}</h2>'
    lines = _lines(panel, shown)
    draw = {"stat": _stat, "table": _table, "bargauge": _bars, "state-timeline": _timeline, "timeseries": _graph}
    px = place["h"] * _ROW_PX
    if not lines:
        body = f"<p class=none>{panel['fieldConfig']['defaults'].get('noValue', 'No data')}</p>"
    else:
        body = draw[panel["type"]](panel, lines, shown, px - 46, regions)
    about = html.escape(panel.get("description", ""))
    return (
        f'<div class=panel style="grid-column:span {place["w"]};height:{px}px"><div class=title>{title}</div>'
        f"<div class=about>{about}</div>{body}</div>"
    )


def _lines(panel: dict[str, Any], shown: Shown) -> list[Line]:
    found: list[Line] = []
    for target in panel["targets"]:
        expr = shown.variables.into(target["expr"])
        # Panels that show the latest value need an instant query.
        start = shown.end if target.get("instant") else shown.start
        for each in series(shown.url, expr, start, shown.end, shown.step_s):
            legend = target.get("legendFormat", "__auto")
            labels = {name: value for name, value in each.labels.items() if name not in ("job", "instance", "__name__")}
            auto = ", ".join(labels.values()) or panel["title"]
            filled = re.sub(r"{{(\w+)}}", partial(_label, each), legend)
            found.append(Line(auto if legend == "__auto" else filled, each))
    return found


def _label(of: Series, match: re.Match[str]) -> str:
    return of.labels.get(match[1], "")


def _regions(path: Path, shown: Shown) -> Iterator[tuple[float, float, str]]:
    """The annotations, as (from, to, color)."""
    for _, color, expr in marks(path, shown.variables):
        for each in series(shown.url, expr, shown.start, shown.end, shown.step_s):
            steps = [(at - number * shown.step_s, at) for number, at in enumerate(each.times)]
            for _, run in groupby(steps, key=lambda pair: round(pair[0])):
                times = [at for _, at in run]
                yield times[0], times[-1] + shown.step_s, _COLORS[color]


def _stat(panel: dict[str, Any], lines: list[Line], *_: object) -> str:
    mode, behind = panel["options"].get("textMode"), panel["options"].get("colorMode") == "background"
    cells: list[str] = []
    for line in lines:
        name, value = html.escape(line.name), html.escape(_text(panel, line.data.values[-1]))
        below = f"<small>{name}</small>" if mode == "value_and_name" else ""
        color = _behind(panel, line) if behind else ""
        cells.append(f"<span style='{color}'>{name if mode == 'name' else value}{below}</span>")
    return f"<div class=stat>{''.join(cells)}</div>"


def _behind(panel: dict[str, Any], line: Line) -> str:
    value = line.data.values[-1]
    mapped = _mapped(panel, value)
    return f"color:#fff;background:{_COLORS[mapped[1]] if mapped else _threshold(panel, value)}"


def _table(_panel: dict[str, Any], lines: list[Line], *_: object) -> str:
    rows = sorted((name, value) for line in lines for name, value in line.data.labels.items())
    return f"<table>{''.join(f'<tr><td>{html.escape(n)}<td>{html.escape(v)}' for n, v in rows)}</table>"


def _bars(panel: dict[str, Any], lines: list[Line], _shown: Shown, px: int, *_: object) -> str:
    values = [line.data.values[-1] for line in lines]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": [f"{line.name}  <b>{_text(panel, line.data.values[-1])}</b>" for line in lines],
        "marker": {"color": [_threshold(panel, value) for value in values]},
    }
    defaults = panel["fieldConfig"]["defaults"]
    span = [defaults.get("min", 0), defaults.get("max", max(values) or 1)]
    layout = {"yaxis": {"autorange": "reversed"}, "xaxis": {"visible": False, "range": span}}
    return _drawn([bars], layout, min(px, 34 * len(lines) + 30))


def _timeline(panel: dict[str, Any], lines: list[Line], shown: Shown, px: int, *_: object) -> str:
    blocks: list[dict[str, Any]] = []
    for line in lines:
        points = zip(line.data.values, line.data.times, strict=True)
        for number, (value, run) in enumerate(groupby(points, key=lambda point: point[0])):
            times = [at for _, at in run]
            text, color = _mapped(panel, value) or (f"{value:g}", ("blue", "light-blue")[number % 2])
            block = {"x": [(times[-1] - times[0] + shown.step_s) * 1000], "base": [_moment(times[0])], "y": [line.name]}
            look = {"type": "bar", "orientation": "h", "text": text, "marker": {"color": _COLORS[color]}}
            blocks.append({**block, **look, "showlegend": False})
    return _drawn(blocks, {"barmode": "overlay", "xaxis": {"type": "date", "range": _span(shown)}}, px)


def _graph(
    panel: dict[str, Any], lines: list[Line], shown: Shown, px: int, regions: list[tuple[float, float, str]]
) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    as_bars = defaults.get("custom", {}).get("drawStyle") == "bars"
    drawn: list[dict[str, Any]] = []
    for line in lines:
        color, dashed = _override(panel, line.name)
        trace = {**_with_gaps(line.data, shown.step_s), "name": line.name}
        shape = "hv" if defaults.get("custom", {}).get("lineInterpolation") == "stepAfter" else "linear"
        style = {"dash": "dash" if dashed else "solid", "color": color, "shape": shape}
        look = {"type": "bar", "marker": {"color": color}} if as_bars else {"mode": "lines", "line": style}
        drawn.append({**trace, **look})
    unit = defaults.get("unit", "")
    layout = {
        "yaxis": {
            "tickformat": ".0%" if unit == "percentunit" else "",
            "ticksuffix": {"s": " s", "reqps": " req/s"}.get(unit, ""),
            "title": {"text": defaults.get("custom", {}).get("axisLabel", "")},
            "rangemode": "tozero",
        },
        "xaxis": {"type": "date", "range": _span(shown)},
        "shapes": [
            {"type": "rect", "yref": "paper", "x0": _moment(start), "x1": _moment(end), "y0": 0, "y1": 1}
            | {"fillcolor": color, "opacity": 0.15, "line": {"width": 1, "color": color}}
            for start, end, color in regions
        ],
        "barmode": "stack",
        "showlegend": True,
        "legend": {"orientation": "h", "y": -0.18},
    }
    return _drawn(drawn, layout, px)


def _with_gaps(data: Series, step_s: float) -> dict[str, list[Any]]:
    """Inserts gaps where samples are missing, so that no line bridges them."""
    x: list[Any] = []
    y: list[Any] = []
    before = data.times[0]
    for at, value in zip(data.times, data.values, strict=True):
        if at - before > 1.5 * step_s:
            x.append(_moment(before + step_s))
            y.append(None)
        x.append(_moment(at))
        y.append(value)
        before = at
    return {"x": x, "y": y}


_numbers = count()


def _drawn(data: list[dict[str, Any]], layout: dict[str, Any], px: int) -> str:
    """An element of the page, and the script that draws into it."""
    layout = {"height": px, "margin": {"l": 50, "r": 8, "t": 4, "b": 20}, "font": {"size": 11}, **layout}
    layout["yaxis"] = {"automargin": True, **layout.get("yaxis", {})}
    name = f"plot{next(_numbers)}"
    drawn = f"Plotly.newPlot('{name}',{json.dumps(data)},{json.dumps(layout)},{{displayModeBar:false}})"
    return f"<div id={name}></div><script>{drawn.replace('</', '<' + chr(92) + '/')}</script>"


def _override(panel: dict[str, Any], name: str) -> tuple[str | None, bool]:
    """The color of the series with this name, and whether its line is dashed."""
    color, dashed = None, False
    for override in panel["fieldConfig"].get("overrides", []):
        if override["matcher"]["options"] == name:
            for each in override["properties"]:
                if each["id"] == "color":
                    color = _COLORS[each["value"]["fixedColor"]]
                dashed = dashed or each["id"] == "custom.lineStyle"
    return color, dashed


def _threshold(panel: dict[str, Any], value: float) -> str:
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    return _COLORS[[s["color"] for s in steps if s["value"] is None or value >= s["value"]][-1]]


def _mapped(panel: dict[str, Any], value: float) -> tuple[str, str] | None:
    """The panel's text and color for ``value``."""
    for mapping in panel["fieldConfig"]["defaults"].get("mappings", []):
        result = mapping["options"].get(f"{value:g}")
        if result is not None:
            return result["text"], result["color"]
    return None


def _text(panel: dict[str, Any], value: float) -> str:
    """The value with its unit, as in Grafana."""
    if (mapped := _mapped(panel, value)) is not None:
        return mapped[0]
    defaults = panel["fieldConfig"]["defaults"]
    unit, digits = defaults.get("unit"), defaults.get("decimals")
    if unit == "percentunit":
        return f"{value * 100:.{1 if digits is None else int(digits)}f}%"
    if unit == "dtdurations" and value >= 2 * 86400:
        return f"{value / 86400:.1f} days"
    if unit == "dtdurations":
        minutes, seconds = divmod(value, 60)
        return f"{int(minutes)} min {seconds:.0f} s" if minutes >= 1 else f"{seconds:.3g} s"
    text = f"{value:.3g}" if digits is None else f"{value:.{int(digits)}f}"
    return f"{text} s" if unit == "s" else text


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def _span(shown: Shown) -> list[str]:
    return [_moment(shown.start), _moment(shown.end)]


def main() -> None:
    """Writes NAME.html for each dashboard."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address")
    parser.add_argument("--minutes", type=float, default=60, help="how far back")
    parser.add_argument("--scrape-s", type=float, default=15, help="the seconds between two scrapes")
    parser.add_argument("-o", "--folder", type=Path, default=Path(), help="where the pages go")
    given = parser.parse_args()
    end = time.time()
    step_s = max(given.scrape_s, given.minutes * 60 / 400)
    variables = Variables(
        interval=f"{step_s * 1000:.0f}ms",
        rate_interval=f"{max(4 * given.scrape_s, step_s + given.scrape_s) * 1000:.0f}ms",
        range=f"{given.minutes * 60:.0f}s",
    )
    shown = Shown(given.prometheus, end - given.minutes * 60, end, step_s, variables)
    for path in DASHBOARDS:
        written = given.folder / f"{path.stem}.html"
        written.write_text(page(path, shown), encoding="utf-8")
        print(written)


if __name__ == "__main__":
    main()
