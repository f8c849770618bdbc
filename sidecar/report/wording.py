"""How the report says things: names a stranger understands, numbers with their units. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sidecar.config.schema import Objective
from sidecar.config.slo import LATENCY_STATISTICS
from sidecar.format import setting
from sidecar.record.trial import Role, TrialStatus
from vllm_sloguard.crash import Crash

OBJECTIVES = {
    Objective.LATENCY: "mean time to a whole answer",
    Objective.GOODPUT: "answers a second within the limits",
    Objective.CAPACITY: "highest request rate within the limits",
}
AXES = {
    Objective.LATENCY: "mean answer time, ms",
    Objective.GOODPUT: "answers/s within the limits",
    Objective.CAPACITY: "highest rate, requests/s",
}
UNITS = {Objective.LATENCY: "ms", Objective.GOODPUT: "answers/s", Objective.CAPACITY: "requests/s"}
LIMITS = {
    **{statistic.name: statistic.label for statistic in LATENCY_STATISTICS},
    "ttft_p99_ms": "first token, p99",
    "itl_p99_ms": "between tokens, p99",
    "e2e_p99_ms": "whole answer, p99",
    "error_rate": "failed requests",
}
ROLES = {
    Role.BASELINE: "what was serving",
    Role.SEARCH: "search",
    Role.UNGUARDED: "past the guard",
    Role.REFERENCE: "what was serving, again",
    Role.VALIDATION: "the candidate, again",
}
STATUSES = {
    TrialStatus.RUNNING: "not ended",
    TrialStatus.FEASIBLE: "met the limits",
    TrialStatus.INFEASIBLE: "missed a limit",
    TrialStatus.CRASHED: "crashed",
    TrialStatus.REFUSED: "refused, not started",
    TrialStatus.ABORTED: "given up",
}
_ENUMERATED = 12


def category(crash: Crash) -> str:
    """ "out of memory"."""
    return str(crash.category).replace("_", " ")


def figure(value: float) -> str:
    """Three digits, or all before the point."""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_unit(value: float | None, objective: Objective) -> str:
    """The objective as people count it: a latency is positive."""
    return "-" if value is None else f"{figure(abs(value))} {UNITS[objective]}"


def measured_text(name: str, value: float | None) -> str:
    """What was measured for the limit ``name``."""
    if value is None:
        return "-"
    if name == "error_rate":
        return f"{value:.2%}".replace(".00%", "%")
    # A request that failed took for ever.
    return "failed requests" if math.isinf(value) else f"{figure(value)} ms"


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
    """ "trial 3", "trials 3, 5 and 8", and no more of them than can be read."""
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
