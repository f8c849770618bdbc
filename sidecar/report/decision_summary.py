"""The decision of a run and what it rests on, in sentences that need no knowledge of this program. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sidecar.config.schema import Objective
from sidecar.measure.measurement import Measurement
from sidecar.measure.verdict import slo_limits
from sidecar.promote.decision import CRASHES_THAT_COUNT, baseline, candidate
from sidecar.promote.interim_analysis import InterimAnalysis, margins_of
from sidecar.record.decisions import Outcome
from sidecar.record.run_snapshot import Recorded
from sidecar.record.trial import VALIDATING, Role, Trial, TrialStatus, margins
from sidecar.report import wording


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
class DecisionSummary:
    """``incumbents`` and ``candidates`` are the trials that are compared: those of the pairs, else their first ones."""

    tone: Tone
    headline: str
    sentences: tuple[str, ...]
    checks: tuple[Check, ...]
    gain: Gain | None
    pairs: tuple[Pair, ...]
    incumbents: tuple[Trial, ...]
    candidates: tuple[Trial, ...]


def decision_summary(recorded: Recorded) -> DecisionSummary:
    """What there is to say of the decision; of a run that goes on, of what is known so far."""
    incumbents, candidates = (_side(recorded, role) for role in VALIDATING)
    tone, headline = _headline(recorded)
    chosen = candidate(recorded.trials)
    first = baseline(recorded.trials)
    return DecisionSummary(
        tone=tone,
        headline=headline,
        sentences=tuple(text for said in (_tried, _left, _best, _compared, _reason) if (text := said(recorded))),
        checks=_checks(recorded, incumbents, candidates),
        gain=_gain(recorded),
        pairs=tuple(_pair(recorded, *pair) for pair in zip(incumbents, candidates, strict=False)),
        incumbents=incumbents or ((first,) if first else ()),
        candidates=candidates or ((chosen,) if chosen else ()),
    )


def _side(recorded: Recorded, role: Role) -> tuple[Trial, ...]:
    """The trials that were compared; while the run goes on, those that were measured for it so far."""
    decision = recorded.decision
    if decision is None:
        return tuple(t for t in recorded.trials if t.plan.role is role and measurement_of(t))
    numbers = decision.incumbents if role is Role.REFERENCE else decision.candidates
    return tuple(t for t in recorded.trials if t.number in numbers)


def _headline(recorded: Recorded) -> tuple[Tone, str]:
    decision = recorded.decision
    if decision is None and not recorded.alive:
        return Tone.OPEN, "This run has not ended, and nothing works on it now"
    if decision is None:
        return Tone.OPEN, "This run is still going: what follows is what is known so far"
    outcome = decision.outcome
    if outcome == Outcome.PROMOTED:
        # The decision names the last of its measurements; it is known by its first one.
        chosen = candidate(recorded.trials)
        number = decision.trial if chosen is None else chosen.number
        return Tone.GOOD, f"A better configuration was found and promoted: that of trial {number}"
    first = baseline(recorded.trials)
    none = "no other configuration met every limit" if not _searched(recorded, TrialStatus.FEASIBLE) else ""
    if none and first is not None and first.status in (TrialStatus.INFEASIBLE, TrialStatus.CRASHED):
        none = "nothing met every limit, nor did what was serving"
    stays = {
        Outcome.KEPT: f"What was serving stays: {none or 'nothing was better by enough'}",
        Outcome.WORSE: "What was serving stays: the best candidate did not hold up when it was measured again",
        Outcome.INCONCLUSIVE: "What was serving stays: the measurements could not tell whether the candidate is better",
        Outcome.INTERRUPTED: "The run was cut off before a decision: what was serving stays",
        Outcome.ABANDONED: "The run was given up before a decision: what was serving stays",
    }
    return Tone.STAYS, stays[outcome]


def _tried(recorded: Recorded) -> str:
    by_status = {status: sum(t.status is status for t in recorded.trials) for status in TrialStatus}
    said = {
        TrialStatus.FEASIBLE: "met every limit",
        TrialStatus.INFEASIBLE: "missed one",
        TrialStatus.CRASHED: "crashed",
        TrialStatus.REFUSED: "were refused by the memory guard before they cost anything",
        TrialStatus.ABORTED: "were given up",
        TrialStatus.RUNNING: "did not end yet",
    }
    counts = wording.listed([f"{by_status[status]} {what}" for status, what in said.items() if by_status[status]])
    if not recorded.trials:
        return "No trial was started yet."
    took = wording.duration(recorded.until - recorded.run.started_at)
    return f"{wording.plural(len(recorded.trials), 'trial')} in {took}: {counts}."


def _searched(recorded: Recorded, status: TrialStatus) -> bool:
    return any(t.plan.role is Role.SEARCH and t.status is status for t in recorded.trials)


def _left(recorded: Recorded) -> str:
    if recorded.decision is not None or recorded.alive:
        return ""
    return "`sloguard tune` would go on with it; `sloguard serve` would end it, and serve what served before."


def _best(recorded: Recorded) -> str:
    if not any(t.plan.role is Role.SEARCH for t in recorded.trials):
        return ""
    chosen, first = candidate(recorded.trials), baseline(recorded.trials)
    objective = recorded.setup.objective
    if first is None:
        serving = "what was serving was not measured"
    elif objective_value(first) is None:
        failed = first.status in (TrialStatus.INFEASIBLE, TrialStatus.CRASHED)
        had = f"{wording.STATUSES[first.status]} in its first trial" if failed else "has no figure"
        serving = f"what was serving {had}"
    else:
        missed = ", and missed a limit" if first.status is TrialStatus.INFEASIBLE else ""
        serving = f"what was serving had {wording.with_unit(objective_value(first), objective)}{missed}"
    if chosen is None:
        if not _searched(recorded, TrialStatus.FEASIBLE):
            return f"No trial of the search met every limit; {serving}.{_nearest(recorded)}"
        return f"No trial of the search that met every limit had a better {wording.OBJECTIVES[objective]}: {serving}."
    again = any(t.plan.role is Role.VALIDATION for t in recorded.trials)
    return (
        f"The best of the search, the candidate, is trial {chosen.number}: {wording.OBJECTIVES[objective]} "
        f"{wording.with_unit(objective_value(chosen), objective)}; {serving}. The luckiest of many trials looks"
        f" better than it is, so this proves nothing yet: both {'were' if again else 'have to be'} re-measured, in"
        " pairs of fresh starts."
    )


def _nearest(recorded: Recorded) -> str:
    """The trial of the search that missed its limits by the least; of a load that was stopped it is not known."""
    slo = recorded.setup.slo
    missed = [
        (max(margins(m, slo).items(), key=lambda item: item[1]), t, m)
        for t in recorded.trials
        if t.plan.role is Role.SEARCH and (m := measurement_of(t)) and not (t.result and t.result.stopped)
    ]
    if not missed:
        return ""
    (name, _), trial, measurement = min(missed, key=lambda found: found[0][1])
    limit = next(limit.limit for limit in slo_limits(measurement, slo) if limit.name == name)
    return (
        f" The nearest, of those whose load ran to its end, is trial {trial.number}: {wording.LIMITS[name]}"
        f" {wording.measured_text(name, _measured(measurement, name))},"
        f" where {wording.measured_text(name, limit)} is the limit."
    )


def _compared(recorded: Recorded) -> str:
    decision, gain = recorded.decision, _gain(recorded)
    if decision is None or gain is None:
        return ""
    latency = recorded.setup.objective is Objective.LATENCY
    better, worse = ("shorter", "longer") if latency else ("higher", "lower")
    noise = decision.noise
    spread = "" if noise is None else f" Starts of one and the same configuration differed by {noise:.1%}."
    what, change = wording.OBJECTIVES[recorded.setup.objective], better if gain.estimate >= 0 else worse
    return (
        f"In {wording.plural(decision.pairs, 'pair')} of starts the candidate's {what} was {abs(gain.estimate):.1%}"
        f" {change}; at {gain.confidence:.0%} confidence the truth lies between {gain.low:+.1%} and {gain.high:+.1%}"
        f" (above 0 is better).{spread}"
    )


def _reason(recorded: Recorded) -> str:
    decision = recorded.decision
    return f"As the journal has it: {wording.sentence(decision.reason)}" if decision and decision.reason else ""


def _gain(recorded: Recorded) -> Gain | None:
    decision, rule = recorded.decision, recorded.setup.promotion
    if decision is None or decision.gain is None or decision.low is None or decision.high is None:
        return None
    if not math.isfinite(decision.gain + decision.low + decision.high):
        return None
    return Gain(decision.gain, decision.low, decision.high, rule.min_gain, rule.confidence)


def _checks(recorded: Recorded, incumbents: Sequence[Trial], candidates: Sequence[Trial]) -> tuple[Check, ...]:
    if not candidates:
        return ()
    rule, found = recorded.setup.promotion, list[Check]()
    gain = _gain(recorded)
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
    analysis = _analysis(recorded, incumbents, candidates)
    found += _failed_check(recorded, analysis)
    pairs = min(len(incumbents), len(candidates))
    planned = wording.listed([str(n) for n in rule.pairs])
    found.append(
        Check(
            "Enough pairs of starts",
            f"interim analyses after {planned}",
            wording.plural(pairs, "pair"),
            pairs >= rule.pairs[0],
        )
    )
    found += _limit_checks(recorded, analysis)
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


def _analysis(recorded: Recorded, incumbents: Sequence[Trial], candidates: Sequence[Trial]) -> InterimAnalysis:
    """The interim analysis that decided; of a run that goes on, the one that these starts would have."""
    setup, decision, pairs = recorded.setup, recorded.decision, len(candidates)
    planned = setup.promotion.pairs
    ended = decision is not None and (decision.outcome is Outcome.INCONCLUSIVE or pairs not in planned)
    return InterimAnalysis(
        tuple(t for t in incumbents if measurement_of(t)),
        tuple(t for t in candidates if measurement_of(t)),
        setup.slo,
        setup.objective,
        setup.promotion,
        last=ended or pairs == planned[-1],
    )


def _failed_check(recorded: Recorded, analysis: InterimAnalysis) -> list[Check]:
    """Whether the incumbent fails, so that no gain is needed."""
    rule = recorded.setup.promotion
    again = [t for t in recorded.trials if t.plan.role is Role.REFERENCE]
    crashed = sum(t.status is TrialStatus.CRASHED for t in again)
    rows = [margins_of(t, recorded.setup.slo) for t in analysis.incumbents]
    if not rows and not crashed:
        return []
    missed = sum(max(row.values(), default=0.0) > 0 for row in rows)
    parts = [f"{missed} of {wording.plural(len(rows), 'start')} missed a limit"] if rows else []
    parts += [f"{wording.plural(crashed, 'start')} crashed"] if crashed else []
    asked = f"it surely misses a limit, at {rule.confidence:.0%} confidence over all limits, or crashes twice"
    what = "The incumbent fails (then no gain is needed)"
    fails = bool(analysis.missed_for_sure()) or crashed >= CRASHES_THAT_COUNT
    return [Check(what, asked, wording.listed(parts), fails if fails or len(rows) > 1 else None)]


def _limit_checks(recorded: Recorded, analysis: InterimAnalysis) -> list[Check]:
    """For each limit, the upper bound of the mean over the starts."""
    rule, slo = recorded.setup.promotion, recorded.setup.slo
    starts = [m for t in analysis.candidates if (m := measurement_of(t))]
    bounds = analysis.candidate_bounds()
    checks: list[Check] = []
    for limit in slo_limits(starts[0], slo) if starts else ():
        rows = [margins_of(t, slo)[limit.name] for t in analysis.candidates]
        high = bounds[limit.name][1]
        worst = max(_measured(m, limit.name) for m in starts)
        bound = "unknown from a single start" if math.isinf(high) else _bounded(limit.name, limit.limit, high)
        checks.append(
            Check(
                f"Meets its limit: {wording.LIMITS[limit.name]}",
                f"at most {wording.measured_text(limit.name, limit.limit)}, at {rule.slo_confidence:.0%} confidence",
                f"{bound}; worst start {wording.measured_text(limit.name, worst)}",
                # One start that exceeds it by more than the tolerance is enough.
                False if max(rows) > rule.tolerance else None if math.isinf(high) else high <= 0,
            )
        )
    return checks


def _bounded(name: str, limit: float, high: float) -> str:
    return f"mean of its starts at most {wording.measured_text(name, max(limit * (1 + high), 0.0))}"


def _measured(measurement: Measurement, name: str) -> float:
    found = getattr(measurement, name)
    return math.inf if found is None else float(found)


def _pair(recorded: Recorded, incumbent: Trial, chosen: Trial) -> Pair:
    objective = recorded.setup.objective
    ours, theirs = objective_value(incumbent), objective_value(chosen)
    ratio = "-"
    if ours and theirs and math.isfinite(ours) and math.isfinite(theirs):
        ratio = f"{(1 - theirs / ours) if objective is Objective.LATENCY else (theirs / ours - 1):+.1%}"
    left, right = (f"trial {t.number}: {wording.with_unit(objective_value(t), objective)}" for t in (incumbent, chosen))
    return Pair(left, right, ratio)


def measurement_of(trial: Trial) -> Measurement | None:
    """What its load showed."""
    return trial.result.measurement if trial.result is not None else None


def objective_value(trial: Trial) -> float | None:
    """The objective, higher is better; None where it was not measured."""
    return trial.result.value if trial.result is not None else None
