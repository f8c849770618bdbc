"""What a window would do: its knobs, and the values that the guard would repair or refuse. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sidecar.format import setting
from sidecar.preflight.window_forecast import Durations, Forecast
from sidecar.record.trial import RepairChange
from sidecar.search.contract import Projection
from vllm_sloguard.guard.memory import Budget
from vllm_sloguard.knobs import Knob, KnobKind, KnobValues, Value

# Number of values checked per range; the edge between two of them is found by bisection.
_ASKED = 9
_HALVINGS = 40


@dataclass(frozen=True)
class RuledOut:
    """Values of a knob that the guard repairs or refuses, as text, and why."""

    values: str
    reason: str


@dataclass(frozen=True)
class KnobPlan:
    """One knob of the search. ``cold`` is the reason why changing it needs a restart; empty for a live knob.

    ``now`` is the incumbent's, None for vLLM's default.
    """

    name: str
    values: str
    now: Value | None
    cold: str
    ruled_out: tuple[RuledOut, ...]
    usable: bool


@dataclass(frozen=True)
class Incumbent:
    """The current configuration. ``promotion`` is its number, None for the file's own arguments.

    ``changes`` are the plugin's repairs at its start; ``refusal`` is why it could not start, and ``unfit`` why it could
    not serve the workload; both are empty if it could. ``warning`` is why it may not start, though it is not refused.
    ``no_budget`` is why there is no ``budget``, if there is none.
    """

    promotion: int | None
    args: dict[str, bool | int | float | str | list[str]]
    changes: tuple[RepairChange, ...]
    refusal: str
    unfit: str
    budget: Budget | None
    warning: str = ""
    no_budget: str = ""


@dataclass(frozen=True)
class NextWindow:
    """When the next window opens, in seconds since the epoch (None without cron), and why none could open now."""

    next_at: float | None
    cron: str | None
    refusals: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class WindowPlan:
    """The plan. ``vllm_version`` is empty if unknown; ``warnings`` do not prevent a window.

    ``command`` starts the current configuration without sloguard. ``slo`` has the limits by name, in their units;
    ``load`` is text; ``unguarded`` are the unguarded trials.
    """

    vllm_version: str
    machine: str
    incumbent: Incumbent
    command: str
    optimizer: str
    objective: str
    slo: dict[str, float]
    load: str
    unguarded: tuple[dict[str, bool | int | float | str | list[str]], ...]
    knobs: tuple[KnobPlan, ...]
    takes: Durations
    forecast: Forecast
    next_window: NextWindow
    warnings: tuple[str, ...] = ()

    @property
    def problem(self) -> str:
        """Why a window could not run as configured, in one line; empty if it could."""
        if self.incumbent.refusal:
            return f"the current configuration could not start: {self.incumbent.refusal}"
        if self.incumbent.unfit:
            return self.incumbent.unfit
        if not any(knob.usable for knob in self.knobs):
            why = next((f": {out.reason}" for knob in self.knobs for out in knob.ruled_out if out.reason), "")
            return f"search.knobs: the guard allows no value of any knob except the current one{why}"
        if not self.forecast.decides:
            return (
                f"window.duration: {self.forecast.window_s:.0f} s are too short for a promotion;"
                f" about {math.ceil(self.forecast.least_window_s / 60)}m are needed"
            )
        return ""


def knob_plan(
    knob: Knob,
    now: Value | None,
    project: Callable[[KnobValues], Projection],
    why: Callable[[KnobValues], str],
    cold: str,
) -> KnobPlan:
    """Runs values of ``knob`` through the guard, with everything else as in the current configuration.

    ``project`` returns the guard's result for a configuration, ``why`` its reasons.
    """

    def passes(value: Value) -> bool:
        found = project({knob.name: value})
        return not found.refusal and found.config.get(knob.name) == value

    def reason(value: Value) -> str:
        return why({knob.name: value})

    if knob.kind is KnobKind.CATEGORICAL:
        out = [RuledOut(setting(choice, knob.name), reason(choice)) for choice in knob.choices if not passes(choice)]
        usable = any(passes(choice) and choice != now for choice in knob.choices)
        return KnobPlan(
            knob.name, ", ".join(setting(choice, knob.name) for choice in knob.choices), now, cold, tuple(out), usable
        )
    values = f"{setting(_tidy(knob, knob.low), knob.name)} to {setting(_tidy(knob, knob.high), knob.name)}"
    asked = _spread(knob)
    good = [value for value in asked if passes(value)]
    if not good:
        return KnobPlan(knob.name, values, now, cold, (RuledOut("all", reason(asked[0])),), usable=False)
    out: list[RuledOut] = []
    if good[0] != asked[0]:
        low = _edge(knob, asked[asked.index(good[0]) - 1], good[0], passes)
        out.append(RuledOut(f"below {setting(low, knob.name)}", reason(asked[0])))
    if good[-1] != asked[-1]:
        high = _edge(knob, asked[asked.index(good[-1]) + 1], good[-1], passes)
        out.append(RuledOut(f"above {setting(high, knob.name)}", reason(asked[-1])))
    return KnobPlan(knob.name, values, now, cold, tuple(out), usable=True)


def cold(knob: Knob, version: tuple[int, int] | None, *, live_trials: bool) -> str:
    """Why changing ``knob`` needs a restart; empty if it does not. An unknown version counts as supported."""
    if knob.live is None:
        return "vLLM reads it only at startup"
    if not live_trials:
        return "engine.live_trials is false"
    if version is not None and not knob.live.in_version(version):
        return f"not tested with vLLM {version[0]}.{version[1]}"
    return ""


def _spread(knob: Knob) -> Sequence[Value]:
    """Values over the whole range, ascending, both ends included."""
    shares = [n / (_ASKED - 1) for n in range(_ASKED)]
    if knob.log:
        found = [knob.low * (knob.high / knob.low) ** share for share in shares]
    else:
        found = [knob.low + (knob.high - knob.low) * share for share in shares]
    found[-1] = knob.high
    return list(dict.fromkeys(_tidy(knob, value) for value in found))


def _tidy(knob: Knob, value: float) -> Value:
    return int(value) if knob.kind is KnobKind.INT else round(value, 4)


def _edge(knob: Knob, bad: Value, good: Value, passes: Callable[[Value], bool]) -> Value:
    """The last value from ``good`` towards ``bad`` that passes."""
    assert not isinstance(bad, str)
    assert not isinstance(good, str)
    for _ in range(_HALVINGS):
        middle = _tidy(knob, (bad + good) / 2)
        assert not isinstance(middle, str)
        if middle in (bad, good):
            break
        bad, good = (bad, middle) if passes(middle) else (middle, good)
    return good
