"""What was measured, against the SLO, as texts with their units. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from sidecar.config.schema import Objective
from sidecar.config.slo import Slo
from sidecar.record.wording import milliseconds

LATENCIES = {
    "ttft_p99_ms": ("TTFT p99", "time to the first token"),
    "itl_p99_ms": ("ITL p99", "time between tokens"),
    "e2e_p99_ms": ("E2E p99", "time to the whole answer"),
}
# How far beyond its limit a bar goes.
_MOST_SHARE = 2.0


@dataclass(frozen=True)
class SloMeter:
    """One latency. ``limit`` is empty where the SLO has none, ``share`` is of it, ``met`` None where nobody knows."""

    name: str
    about: str
    shown: str
    limit: str
    share: float | None
    met: bool | None


def figures(p99s_ms: Mapping[str, float | None], slo: Slo, *, lower_bounds: bool = False) -> tuple[SloMeter, ...]:
    """All three latencies, by the names of their limits; of lower bounds only a miss is sure."""
    return tuple(
        _figure(name, about, p99s_ms.get(key), getattr(slo, key), lower_bounds=lower_bounds)
        for key, (name, about) in LATENCIES.items()
    )


def _figure(name: str, about: str, ms: float | None, limit_ms: float | None, *, lower_bounds: bool) -> SloMeter:
    shown = f"{'≥ ' if lower_bounds and ms is not None else ''}{milliseconds(ms)}"
    limit = "" if limit_ms is None else milliseconds(limit_ms)
    if limit_ms is None or ms is None:
        return SloMeter(name, about, shown, limit, None, None)
    met = ms <= limit_ms
    return SloMeter(name, about, shown, limit, min(ms / limit_ms, _MOST_SHARE), None if met and lower_bounds else met)


@dataclass(frozen=True)
class Goal:
    """What is raised or lowered, and in which unit."""

    name: str
    unit: str
    lower_is_better: bool


GOALS = {
    Objective.LATENCY: Goal("mean E2E", "ms", lower_is_better=True),
    Objective.GOODPUT: Goal("goodput", "requests/s", lower_is_better=False),
    Objective.CAPACITY: Goal("capacity", "requests/s", lower_is_better=False),
}


def in_words(value: float | None, objective: Objective) -> str:
    """A value in the unit of its goal, for people."""
    if value is None:
        return "-"
    return milliseconds(value) if objective is Objective.LATENCY else f"{value:.3g}/s"
