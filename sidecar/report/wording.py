"""Names and formats of the report, for readers who do not know sloguard. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sidecar.config.schema import Objective
from sidecar.config.slo import ERROR_RATE, LATENCY_STATISTICS, MISS_RATE
from sidecar.format import setting
from sidecar.record.trial import Role
from vllm_sloguard.crash import Crash

OBJECTIVES = {
    Objective.LATENCY: "mean E2E latency",
    Objective.GOODPUT: "goodput (requests/s that meet the SLO)",
    Objective.CAPACITY: "capacity (highest rate that meets the SLO)",
}
AXES = {
    Objective.LATENCY: "mean E2E latency, ms",
    Objective.GOODPUT: "goodput, requests/s",
    Objective.CAPACITY: "capacity, requests/s",
}
UNITS = {Objective.LATENCY: "ms", Objective.GOODPUT: "requests/s", Objective.CAPACITY: "requests/s"}
LIMITS = {
    **{statistic.name: statistic.label for statistic in LATENCY_STATISTICS},
    ERROR_RATE: "error rate",
    MISS_RATE: "requests that miss a limit",
}
SHARES = frozenset({ERROR_RATE, MISS_RATE})
ROLES = {
    Role.BASELINE: "incumbent",
    Role.SEARCH: "search",
    Role.UNGUARDED: "unguarded",
    Role.REFERENCE: "incumbent, re-measured",
    Role.VALIDATION: "candidate, re-measured",
    Role.LOWER_RATE: "nearest miss, at lower rates",
}
_ENUMERATED = 12


def category(crash: Crash) -> str:
    """ "out of memory"."""
    return str(crash.category).replace("_", " ")


def figure(value: float) -> str:
    """Three significant digits, or all before the decimal point."""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_unit(value: float | None, objective: Objective, *, at_least: bool = False) -> str:
    """The objective with its unit; a latency is positive."""
    return "-" if value is None else f"{'≥ ' if at_least else ''}{figure(abs(value))} {UNITS[objective]}"


def measured_text(name: str, value: float | None) -> str:
    """What was measured for the limit ``name``."""
    if value is None:
        return "-"
    if name in SHARES:
        return f"{value:.2%}".replace(".00%", "%")
    return "∞ (failed requests)" if math.isinf(value) else f"{figure(value)} ms"


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plural(count: int, noun: str) -> str:
    """ "1 trial", "2 trials"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1] if parts else "") if part)


def trial_numbers(numbers: Iterable[int]) -> str:
    """ "trial 3", "trials 3, 5 and 8"; long lists are shortened."""
    found = list(numbers)
    shown = [str(n) for n in found[:_ENUMERATED]]
    if len(found) > _ENUMERATED:
        shown.append(f"{len(found) - _ENUMERATED} more")
    return f"trial{'s' if len(found) > 1 else ''} {listed(shown)}"


def arguments_text(args: Mapping[str, Any]) -> str:
    """ "max_num_seqs = 8, block_size = 32"."""
    return ", ".join(f"{name} = {setting(given, name)}" for name, given in args.items())


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    text = " ".join(text.split())
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" else f"{text}."
