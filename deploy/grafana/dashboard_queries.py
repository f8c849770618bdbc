"""The queries of the dashboards, with Grafana's variables replaced, and functions to run them."""

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARDS = tuple(Path(__file__).with_name(f"sloguard-{name}.json") for name in ("tuning", "serving"))
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Variables:
    """Values of Grafana's variables: regular expressions, and PromQL durations."""

    job: str = ".+"
    model: str = ".+"
    instance: str = ".+"
    interval: str = "15s"
    rate_interval: str = "1m"
    range: str = "1h"

    def into(self, expr: str) -> str:
        """``expr`` with its variables replaced."""
        values = {
            "$__rate_interval": self.rate_interval,
            "$__interval_ms": str(round(seconds(self.interval) * 1000)),
            "$__interval": self.interval,
            "$__range": self.range,
            "${instance:regex}": self.instance,
            "$model": self.model,
            "$job": self.job,
        }
        for name, value in values.items():
            expr = expr.replace(name, value)
        return expr


def seconds(interval: str) -> float:
    """The seconds of "15s", "100ms", "1m" or "1h"."""
    number = interval.rstrip("msh")
    return float(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[interval[len(number) :]]


def panels(path: Path) -> list[dict[str, Any]]:
    """Every panel of a dashboard, including rows."""
    return json.loads(path.read_text(encoding="utf-8"))["panels"]


def panel_queries(path: Path, variables: Variables) -> Iterator[tuple[str, str]]:
    """The title and the PromQL of every query of every panel."""
    for panel in panels(path):
        for target in panel.get("targets", []):
            yield panel["title"], variables.into(target["expr"])


def marks(path: Path, variables: Variables) -> Iterator[tuple[str, str, str]]:
    """The name, color and PromQL of each annotation."""
    for mark in json.loads(path.read_text(encoding="utf-8"))["annotations"]["list"]:
        yield mark["name"], mark["iconColor"], variables.into(mark["expr"])


@dataclass(frozen=True)
class Series:
    """One line: times in seconds since the epoch, and finite values."""

    labels: Mapping[str, str]
    times: tuple[float, ...]
    values: tuple[float, ...]


def ask(url: str, api: str, parameters: Mapping[str, object]) -> Any:
    """The response of the Prometheus API at ``url``. Raises ValueError with its message for a wrong query."""
    body = urllib.parse.urlencode(parameters).encode()
    try:
        with urllib.request.urlopen(f"{url}/api/v1/{api}", body or None, _TIMEOUT_S) as answer:  # noqa: S310
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise ValueError(f"{parameters}: {json.load(error).get('error')}") from None


def series(url: str, expr: str, start: float, end: float, step_s: float) -> list[Series]:
    """The series from ``start`` to ``end``; if they are equal, of an instant query, in its order."""
    if start == end:
        found = ask(url, "query", {"query": expr, "time": end})["result"]
        return _lines([{**each, "values": [each["value"]]} for each in found])
    return _lines(ask(url, "query_range", {"query": expr, "start": start, "end": end, "step": step_s})["result"])


def _lines(found: list[dict[str, Any]]) -> list[Series]:
    lines: list[Series] = []
    for each in found:
        points = [(at, float(text)) for at, text in each["values"] if math.isfinite(float(text))]
        if points:
            times, values = zip(*points, strict=True)
            lines.append(Series(each["metric"], times, values))
    return lines
