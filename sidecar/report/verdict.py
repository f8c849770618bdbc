"""The decision of a run and what it rests on, in sentences that need no knowledge of this program. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeGuard

from sidecar.comparison import bounds
from sidecar.config import Objective
from sidecar.judge import Measurement, limits
from sidecar.promotion import Outcome, baseline, candidate
from sidecar.recorded import Recorded
from sidecar.report import words
from sidecar.trial import Role, Status, Trial, margins

_PER_SIDE = {"incumbents": Role.REFERENCE, "candidates": Role.VALIDATION}


class Tone(StrEnum):
    """How a verdict is coloured."""

    GOOD = "good"
    STAYS = "stays"
    OPEN = "open"


@dataclass(frozen=True)
class Check:
    """One condition of the rule: what it asks, what was found, and whether that suffices; None where it is unknown."""

    what: str
    asked: str
    found: str
    met: bool | None


@dataclass(frozen=True)
class Gain:
    """Relative, of the objective: the estimate between its bounds, and the least that the rule asks for."""

    estimate: float
    low: float
    high: float
    least: float
    confidence: float


@dataclass(frozen=True)
class Pair:
    """Two starts that were measured side by side, in words; ``ratio`` is the gain of this pair alone."""

    incumbent: str
    candidate: str
    ratio: str


@dataclass(frozen=True)
class Verdict:
    """``incumbents`` and ``candidates`` are the trials that are compared: those of the pairs, else their first ones.

    ``outcome`` is the journal's word.
    """

    outcome: str
    tone: Tone
    headline: str
    sentences: tuple[str, ...]
    checks: tuple[Check, ...]
    gain: Gain | None
    pairs: tuple[Pair, ...]
    incumbents: tuple[Trial, ...]
    candidates: tuple[Trial, ...]


def verdict(recorded: Recorded) -> Verdict:
    """What there is to say of the decision; of a run that goes on, of what is known so far."""
    decision: dict[str, Any] = recorded.run.decision or {}
    incumbents, candidates = (_side(recorded, decision, side) for side in _PER_SIDE)
    tone, headline = _headline(recorded)
    chosen = candidate(recorded.trials)
    first = baseline(recorded.trials)
    return Verdict(
        outcome=str(decision.get("outcome", "not decided")),
        tone=tone,
        headline=headline,
        sentences=tuple(text for said in (_tried, _left, _best, _compared, _reason) if (text := said(recorded))),
        checks=_checks(recorded, decision, incumbents, candidates),
        gain=_gain(recorded, decision),
        pairs=tuple(_pair(recorded, *pair) for pair in zip(incumbents, candidates, strict=False)),
        incumbents=incumbents or ((first,) if first else ()),
        candidates=candidates or ((chosen,) if chosen else ()),
    )


def _side(recorded: Recorded, decision: dict[str, Any], side: str) -> tuple[Trial, ...]:
    """The trials that were compared; while the run goes on, those that were measured for it so far."""
    if recorded.run.decision is None:
        return tuple(t for t in recorded.trials if t.plan.role is _PER_SIDE[side] and measurement_of(t))
    numbers: set[int] = set(decision.get(side) or ())
    return tuple(t for t in recorded.trials if t.number in numbers)


def _headline(recorded: Recorded) -> tuple[Tone, str]:
    decision = recorded.run.decision
    if decision is None and not recorded.alive:
        return Tone.OPEN, "This run has not ended, and nothing works on it now"
    if decision is None:
        return Tone.OPEN, "This run is still going: what follows is what is known so far"
    outcome = decision["outcome"]
    if outcome == Outcome.PROMOTED:
        return Tone.GOOD, f"A better configuration was found and promoted: that of trial {decision.get('trial')}"
    none = "no other configuration met every limit" if not _searched(recorded, Status.FEASIBLE) else ""
    stays = {
        Outcome.KEPT: f"What was serving stays: {none or 'nothing was better by enough'}",
        Outcome.WORSE: "What was serving stays: the best candidate did not hold up when it was measured again",
        Outcome.INCONCLUSIVE: "What was serving stays: the measurements could not tell whether the candidate is better",
        "interrupted": "The run was cut off before a decision: what was serving stays",
        "abandoned": "The run was given up before a decision: what was serving stays",
    }
    return Tone.STAYS, stays.get(outcome, f"What was serving stays: {outcome}")


def _tried(recorded: Recorded) -> str:
    by_status = {status: sum(t.status is status for t in recorded.trials) for status in Status}
    said = {
        Status.FEASIBLE: "met every limit",
        Status.INFEASIBLE: "missed one",
        Status.CRASHED: "crashed",
        Status.REFUSED: "were refused by the memory guard before they cost anything",
        Status.ABORTED: "were given up",
        Status.RUNNING: "did not end yet",
    }
    counts = words.listed([f"{by_status[status]} {what}" for status, what in said.items() if by_status[status]])
    if not recorded.trials:
        return "No trial was started yet."
    last = max(t.ended_at or (recorded.now if recorded.alive else t.started_at) for t in recorded.trials)
    ended = recorded.run.ended_at or last
    took = words.duration(ended - recorded.run.started_at)
    return f"{words.plural(len(recorded.trials), 'trial')} in {took}: {counts}."


def _searched(recorded: Recorded, status: Status) -> bool:
    return any(t.plan.role is Role.SEARCH and t.status is status for t in recorded.trials)


def _left(recorded: Recorded) -> str:
    if recorded.run.decision is not None or recorded.alive:
        return ""
    return "`sloguard tune` would go on with it; `sloguard serve` would end it, and serve what served before."


def _best(recorded: Recorded) -> str:
    if not any(t.plan.role is Role.SEARCH for t in recorded.trials):
        return ""
    chosen, first = candidate(recorded.trials), baseline(recorded.trials)
    objective = recorded.setup.objective
    incumbent = ""
    if first is not None:
        shown = words.with_unit(value_of(first), objective)
        incumbent = shown if value_of(first) is not None else f"no figure ({words.STATUSES[first.status]})"
    if chosen is None:
        serving = f"what was serving had {incumbent}" if incumbent else "what was serving was not measured"
        if not _searched(recorded, Status.FEASIBLE):
            return f"No trial of the search met every limit; {serving}."
        return f"No trial of the search that met every limit had a better {words.OBJECTIVES[objective]}: {serving}."
    against = f", against {incumbent} of what was serving" if incumbent else ""
    again = any(t.plan.role is Role.VALIDATION for t in recorded.trials)
    return (
        f"The best of the search, the candidate, is trial {chosen.number}: {words.OBJECTIVES[objective]} "
        f"{words.with_unit(value_of(chosen), objective)}{against}. The luckiest of many looks better than it is, so"
        f" this is no evidence yet: both {'were' if again else 'have to be'} measured anew, in pairs of fresh starts."
    )


def _compared(recorded: Recorded) -> str:
    decision = recorded.run.decision or {}
    gain = _gain(recorded, decision)
    if gain is None:
        return ""
    better = "shorter" if recorded.setup.objective is Objective.LATENCY else "higher"
    worse = "longer" if recorded.setup.objective is Objective.LATENCY else "lower"
    what, noise = words.OBJECTIVES[recorded.setup.objective], decision.get("noise")
    spread = f" Starts of one and the same configuration differed by {noise:.1%}." if _number(noise) else ""
    return (
        f"In {words.plural(int(decision.get('pairs') or 0), 'pair')} of starts the candidate's {what} was"
        f" {abs(gain.estimate):.1%} {better if gain.estimate >= 0 else worse}; at {gain.confidence:.0%} confidence the"
        f" truth lies between {gain.low:+.1%} and {gain.high:+.1%} (above 0 is better).{spread}"
    )


def _reason(recorded: Recorded) -> str:
    decision = recorded.run.decision or {}
    return f"As the journal has it: {words.sentence(str(decision['reason']))}" if decision.get("reason") else ""


def _gain(recorded: Recorded, decision: dict[str, Any]) -> Gain | None:
    found = [decision.get(name) for name in ("gain", "low", "high")]
    estimate, low, high = (float(value) if _number(value) else math.nan for value in found)
    if math.isnan(estimate + low + high):
        return None
    rule = recorded.setup.promotion
    return Gain(estimate, low, high, rule.min_gain, rule.confidence)


def _number(given: Any) -> TypeGuard[int | float]:
    return isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)


def _checks(
    recorded: Recorded, decision: dict[str, Any], incumbents: Sequence[Trial], candidates: Sequence[Trial]
) -> tuple[Check, ...]:
    if not candidates:
        return ()
    rule, found = recorded.setup.promotion, list[Check]()
    gain = _gain(recorded, decision)
    if gain is not None:
        found += [
            Check(
                "The candidate is better, beyond doubt",
                f"the gain's lower bound above 0, at {rule.confidence:.0%} confidence",
                f"{gain.low:+.1%}",
                gain.low > 0,
            ),
            Check("Better by enough", f"an estimated gain of {rule.min_gain:.0%} or more", f"{gain.estimate:+.1%}",
                  gain.estimate >= rule.min_gain),
        ]  # fmt: skip
    pairs = min(len(incumbents), len(candidates))
    looks = words.listed([str(n) for n in rule.pairs])
    found.append(
        Check("Enough pairs of starts", f"looked at after {looks}", words.plural(pairs, "pair"), pairs >= rule.pairs[0])
    )
    found += _limit_checks(recorded, candidates)
    requests = sum(m.requests for t in candidates if (m := measurement_of(t)))
    found.append(
        Check(
            "Enough requests for a 99th percentile",
            f"{rule.requests_for_p99} of the candidate",
            str(requests),
            requests >= rule.requests_for_p99,
        )
    )
    return tuple(found)


def _limit_checks(recorded: Recorded, candidates: Sequence[Trial]) -> list[Check]:
    """For each limit, the upper bound over the starts; as sidecar.promotion has it."""
    rule, slo = recorded.setup.promotion, recorded.setup.slo
    alpha = (1 - rule.slo_confidence) / len(rule.pairs)
    starts = [m for t in candidates if (m := measurement_of(t))]
    checks: list[Check] = []
    for limit in limits(starts[0], slo) if starts else ():
        rows = [margins(m, slo)[limit.name] for m in starts]
        high = bounds(rows, alpha)[1]
        worst = max(_measured(m, limit.name) for m in starts)
        bound = "unknown from a single start" if math.isinf(high) else _bounded(limit.name, limit.limit, high)
        checks.append(
            Check(
                f"Meets its limit: {words.LIMITS[limit.name]}",
                f"at most {words.measured(limit.name, limit.limit)}, at {rule.slo_confidence:.0%} confidence",
                f"{bound}; worst start {words.measured(limit.name, worst)}",
                None if math.isinf(high) else high <= 0 and max(rows) <= rule.tolerance,
            )
        )
    return checks


def _bounded(name: str, limit: float, high: float) -> str:
    return f"at most {words.measured(name, max(limit * (1 + high), 0.0))}"


def _measured(measurement: Measurement, name: str) -> float:
    found = getattr(measurement, name)
    return math.inf if found is None else float(found)


def _pair(recorded: Recorded, incumbent: Trial, chosen: Trial) -> Pair:
    objective = recorded.setup.objective
    ours, theirs = value_of(incumbent), value_of(chosen)
    ratio = "-"
    if ours and theirs and math.isfinite(ours) and math.isfinite(theirs):
        ratio = f"{(1 - theirs / ours) if objective is Objective.LATENCY else (theirs / ours - 1):+.1%}"
    left, right = (f"trial {t.number}: {words.with_unit(value_of(t), objective)}" for t in (incumbent, chosen))
    return Pair(left, right, ratio)


def measurement_of(trial: Trial) -> Measurement | None:
    """What its load showed."""
    return trial.result.measurement if trial.result is not None else None


def value_of(trial: Trial) -> float | None:
    """The objective, higher is better; None where it was not measured."""
    return trial.result.value if trial.result is not None else None
