"""Repairs a configuration that vLLM would not start with, or refuses it.

The rules are in ``vllm_sloguard.guard.rules``. The first broken rule is fixed and all are checked again until none is
broken, so repairs are idempotent. Then each change is reverted if later ones made it unnecessary. Two repairs of the
SLO-Guard study have no rule here, because vLLM (0.26 to 0.32) starts without them: chunked prefill in eager mode is
allowed, and sequences times length above 0.7 of the KV tokens only causes preemption.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any

from vllm_sloguard.guard import memory
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import Budget
from vllm_sloguard.guard.model_shape import ModelShape
from vllm_sloguard.guard.rules import ALL
from vllm_sloguard.guard.rules.arguments import ARGUMENTS
from vllm_sloguard.guard.rules.rule import Broken, Case, Estimate, Limits, Rule, Version
from vllm_sloguard.knobs import KnobValues, Value

__all__ = ["TUNED", "ArgumentChange", "Limits", "Repair", "RepairStatus", "repair"]

# Every argument that a rule checks.
TUNED: tuple[str, ...] = tuple(ARGUMENTS)
# Far more than any combination of rules and arguments needs.
_ROUNDS = 64


class RepairStatus(StrEnum):
    """The outcome for a configuration."""

    UNCHANGED = "unchanged"
    REPAIRED = "repaired"
    REFUSED = "refused"


@dataclass(frozen=True)
class ArgumentChange:
    """One changed argument; None means absent, so vLLM's default. ``rules`` names the broken rules."""

    name: str
    before: Value | None
    after: Value | None
    reason: str
    rules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Repair:
    """The outcome. ``args`` are the input unless repaired; ``budget`` needs a shape and a machine.

    ``rule`` names the rule that caused a refusal. ``warning`` states why a configuration that passed may not start.
    """

    status: RepairStatus
    args: KnobValues
    changes: tuple[ArgumentChange, ...]
    refusal: str
    budget: Budget | None
    rule: str = ""
    warning: str = ""


@dataclass(frozen=True)
class _Outcome:
    """The result of applying the rules. ``why`` has the broken rules and reasons for each changed argument."""

    case: Case
    why: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict[str, tuple[tuple[str, str], ...]])
    rule: str = ""
    refusal: str = ""


def repair(
    args: KnobValues,
    shape: ModelShape | None,
    machine: Machine | None,
    *,
    pinned: frozenset[str] = frozenset(),
    workload_max_len: int | None = None,
    estimate: Estimate = memory.estimate,
    limits: Limits | Callable[[KnobValues], Limits] | None = None,
    vllm_version: Version | None = None,
    unknown: str = "",
) -> Repair:
    """Repairs ``args`` (EngineArgs names; absent or None means vLLM's default), or refuses them.

    Arguments in ``pinned`` are never changed, and max_model_len is never lowered below ``workload_max_len`` tokens.
    Rules that need a shape or a machine are skipped without one; without a version ("0.32" is (0, 32)), no rule is
    skipped for its version. ``limits`` was learned on this host about this model, either for all arguments or as a
    function of them. ``estimate`` is the memory estimate with the best available evidence (start_history.py).
    ``unknown`` is the reason why the model's shape is unknown, for the warning.
    Deterministic and idempotent; never raises, whatever the values.
    """
    given = {name: value for name, value in args.items() if value is not None or _takes_no_none(name)}  # pyright: ignore[reportUnnecessaryComparison]
    case = Case(given, shape, machine, pinned, workload_max_len or 0, _taught(limits), vllm_version, estimate)
    outcome = _apply_rules(case)
    if outcome.refusal:
        # Without valid values, there is no budget to compute.
        numbers = _first(case, values_only=True) is None
        return Repair(RepairStatus.REFUSED, args, (), outcome.refusal, case.budget if numbers else None, outcome.rule)
    outcome = _minimal(case, outcome)
    changes = tuple(
        ArgumentChange(
            name,
            given.get(name),
            outcome.case.args.get(name),
            "; ".join(dict.fromkeys(reason for _, reason in why)),
            tuple(dict.fromkeys(rule for rule, _ in why)),
        )
        for name, why in outcome.why.items()
        if not _same(given, outcome.case.args, name)
    )
    status = RepairStatus.REPAIRED if changes else RepairStatus.UNCHANGED
    budget = outcome.case.budget
    warning = _warning(budget, unknown)
    return Repair(status, outcome.case.args if changes else args, changes, "", budget, warning=warning)


def _warning(budget: Budget | None, unknown: str) -> str:
    """Why a configuration that passed may not start; empty if it certainly does."""
    if budget is None:
        return f"memory is not checked: {unknown}" if unknown else ""
    spare = budget.kv_bytes - budget.request_bytes - budget.margin_bytes
    if budget.starts and (budget.dependable or spare >= 0):
        return ""
    layers = "" if budget.exact_layout else ", which do not cover all of its layers"
    error = f"and may be off by {memory.gib(budget.margin_bytes)} GiB"
    basis = f"the estimate is based on {budget.rung.description}{layers}, {error}"
    return f"it may not start: {budget.reason}; {basis}" if not budget.starts else f"it may not start: {basis}"


def _taught(limits: Limits | Callable[[KnobValues], Limits] | None) -> Callable[[KnobValues], Limits]:
    if callable(limits):
        return limits
    return lambda _: limits or Limits()


# The number of rules on single values, which come first.
_VALUE_RULES = next(number for number, rule in enumerate(ALL) if rule.name == "heads")


def _takes_no_none(name: str) -> bool:
    return name in ARGUMENTS and ARGUMENTS[name].default is not None


def _same(one: KnobValues, other: KnobValues, name: str) -> bool:
    before, after = one.get(name), other.get(name)
    # NaN is not equal to itself; True must differ from 1.
    same = before is after or (type(before) is type(after) and before == after)
    return (name in one) == (name in other) and same


def _first(case: Case, *, values_only: bool = False) -> tuple[Rule, Broken] | None:
    for rule in _rules_of(case.version, values_only):
        broken = rule.check(case)
        if broken is not None:
            return rule, broken
    return None


@lru_cache(maxsize=16)
def _rules_of(version: Version | None, values_only: bool) -> tuple[Rule, ...]:
    """The rules that hold for a version of vLLM."""
    rules = ALL[:_VALUE_RULES] if values_only else ALL
    return tuple(rule for rule in rules if rule.versions.hold(version))


def _apply_rules(case: Case) -> _Outcome:
    """Fixes the first broken rule until none is broken; a refusal quotes the first broken rule."""
    why: dict[str, tuple[tuple[str, str], ...]] = {}
    said: dict[str, str] = {}
    for _ in range(_ROUNDS):
        found = _first(case)
        if found is None:
            return _Outcome(case, why)
        rule, broken = found
        reason = said.setdefault(rule.name, broken.reason)
        way = next((way for way in broken.ways if way[0] not in case.pinned), None)
        if way is None:
            held = sorted({name for name, _ in broken.ways})
            return _Outcome(case, why, rule.name, f"{reason}; pinned: {', '.join(held)}" if held else reason)
        why[way[0]] = (*why.get(way[0], ()), (rule.name, broken.reason))
        case = case.but(*way)
    return _Outcome(case, why, "rules", "the repair rules contradict each other here")


def _minimal(start: Case, outcome: _Outcome) -> _Outcome:
    """Reverts or reduces, one by one, changes that the others have made unnecessary."""
    for name in outcome.why:
        if _same(start.args, outcome.case.args, name):
            continue
        again = _apply_rules(_restored(outcome.case, start, name))
        others = {*outcome.case.args, *again.case.args} - {name}
        if not again.refusal and all(_same(outcome.case.args, again.case.args, other) for other in others):
            outcome = _Outcome(again.case, {**outcome.why, name: again.why.get(name, ())})
    return outcome


def _restored(case: Case, start: Case, name: str) -> Case:
    args: dict[str, Any] = {key: value for key, value in case.args.items() if key != name}
    if name in start.args:
        args[name] = start.args[name]
    return replace(case, args=args)
