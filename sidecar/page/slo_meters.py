"""Measurements against the limits of the SLO, as text with units. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

from sidecar.config.schema import Objective
from sidecar.config.slo import LATENCY_STATISTICS, LatencyKind, LatencyStatistic, Slo, Statistic
from sidecar.record.wording import milliseconds

_ABOUT = {
    LatencyKind.TTFT: "time to first token",
    LatencyKind.ITL: "gap between two tokens",
    LatencyKind.TPOT: "mean gap of a request",
    LatencyKind.E2E: "time to the last token",
}
# Bars end at this multiple of the limit.
_MAX_BAR_RATIO = 2.0


@dataclass(frozen=True)
class SloMeter:
    """One latency statistic. ``limit`` may be empty; ``share`` is measured / limit; ``met`` is None if unknown."""

    name: str
    about: str
    measured: str
    limit: str
    share: float | None
    met: bool | None


def slo_meters(
    measured_ms: Callable[[LatencyStatistic], float | None], slo: Slo, *, lower_bounds: bool = False
) -> tuple[SloMeter, ...]:
    """The p99 of each latency, and every other statistic with a limit; lower bounds can only show a miss."""
    limits = {limit.name: limit.limit_ms for limit in slo.latency_limits}
    chosen = [s for s in LATENCY_STATISTICS if s.statistic is Statistic.P99 or s.name in limits]
    return tuple(_meter(s, measured_ms(s), limits.get(s.name), lower_bounds=lower_bounds) for s in chosen)


def _meter(statistic: LatencyStatistic, ms: float | None, limit_ms: float | None, *, lower_bounds: bool) -> SloMeter:
    measured = f"{'≥ ' if lower_bounds and ms is not None else ''}{milliseconds(ms)}"
    limit = "" if limit_ms is None else milliseconds(limit_ms)
    share = met = None
    if limit_ms is not None and ms is not None:
        share = min(ms / limit_ms, _MAX_BAR_RATIO)
        within = ms <= limit_ms
        met = None if within and lower_bounds else within
    return SloMeter(statistic.label, _ABOUT[statistic.kind], measured, limit, share, met)


@dataclass(frozen=True)
class ObjectiveUnit:
    """The objective and its unit."""

    name: str
    unit: str
    lower_is_better: bool


OBJECTIVE_UNITS = {
    Objective.LATENCY: ObjectiveUnit("mean E2E", "ms", lower_is_better=True),
    Objective.GOODPUT: ObjectiveUnit("goodput", "requests/s", lower_is_better=False),
    Objective.CAPACITY: ObjectiveUnit("capacity", "requests/s", lower_is_better=False),
}


def format_objective(value: float | None, objective: Objective, *, at_least: bool = False) -> str:
    """A value of the objective with its unit; ``at_least`` marks a lower bound."""
    if value is None:
        return "-"
    text = milliseconds(value) if objective is Objective.LATENCY else f"{value:.3g}/s"
    return f"≥ {text}" if at_least else text
