"""The decision of a run and its evidence, in sentences for readers who do not know sloguard. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sidecar.config.schema import Objective
from sidecar.measure.measurement import Measurement
from sidecar.measure.verdict import slo_limits
from sidecar.promote.candidate import SearchedSpace, baseline, candidate
from sidecar.promote.decision import CRASHES_THAT_COUNT
from sidecar.promote.interim_analysis import InterimAnalysis, margins_of
from sidecar.promote.nearest_miss import nearest_miss
from sidecar.record.decisions import Outcome
from sidecar.record.run_snapshot import RunSnapshot
from sidecar.record.trial import VALIDATING, Role, Trial, TrialStatus
from sidecar.report import wording


class Tone(StrEnum):
    """How the decision is coloured."""

    GOOD = "good"
    STAYS = "stays"
    OPEN = "open"


@dataclass(frozen=True)
class Check:
    """One condition of the promotion rule: what is required, what was measured, whether it is met (None: unknown)."""

    condition: str
    required: str
    measured: str
    met: bool | None


@dataclass(frozen=True)
class Gain:
    """The relative gain in the objective: the estimate, its interval, and the least that the rule requires."""

    estimate: float
    low: float
    high: float
    least: float
    confidence: float


@dataclass(frozen=True)
class Pair:
    """Two replicates measured one after the other, as text; ``ratio`` is the gain of this pair alone."""

    incumbent: str
    candidate: str
    ratio: str


@dataclass(frozen=True)
class DecisionSummary:
    """``incumbents`` and ``candidates`` are the compared trials: those of the pairs, else the first of each."""

    tone: Tone
    headline: str
    sentences: tuple[str, ...]
    checks: tuple[Check, ...]
    gain: Gain | None
    pairs: tuple[Pair, ...]
    incumbents: tuple[Trial, ...]
    candidates: tuple[Trial, ...]


def candidate_of(snapshot: RunSnapshot) -> Trial | None:
    """The trial that the search chose."""
    return candidate(snapshot.trials, SearchedSpace(snapshot.setup.knobs, snapshot.setup.slo))


def decision_summary(snapshot: RunSnapshot) -> DecisionSummary:
    """The decision; of a run in progress, what is known of it."""
    incumbents, candidates = (_side(snapshot, role) for role in VALIDATING)
    tone, headline = _headline(snapshot)
    chosen = candidate_of(snapshot)
    first = baseline(snapshot.trials)
    return DecisionSummary(
        tone=tone,
        headline=headline,
        sentences=tuple(text for part in (_reason, _best, _left, _counts) if (text := part(snapshot))),
        checks=_checks(snapshot, incumbents, candidates),
        gain=_gain(snapshot),
        pairs=tuple(_pair(snapshot, *pair) for pair in zip(incumbents, candidates, strict=False)),
        incumbents=incumbents or ((first,) if first else ()),
        candidates=candidates or ((chosen,) if chosen else ()),
    )


def _side(snapshot: RunSnapshot, role: Role) -> tuple[Trial, ...]:
    """The trials that were compared; of a run in progress, those measured for it until now."""
    decision = snapshot.decision
    if decision is None:
        return tuple(t for t in snapshot.trials if t.plan.role is role and measurement_of(t))
    numbers = decision.incumbents if role is Role.REFERENCE else decision.candidates
    return tuple(t for t in snapshot.trials if t.number in numbers)


def _headline(snapshot: RunSnapshot) -> tuple[Tone, str]:
    decision = snapshot.decision
    if decision is None and not snapshot.alive:
        return Tone.OPEN, "This run was interrupted before its decision"
    if decision is None:
        return Tone.OPEN, "This run is in progress: what follows is preliminary"
    outcome = decision.outcome
    if outcome == Outcome.PROMOTED:
        # The decision names the last trial of the candidate; readers know it by its first one.
        chosen = candidate_of(snapshot)
        number = decision.trial if chosen is None else chosen.number
        return Tone.GOOD, f"A better configuration was found and promoted: trial {number}"
    first = baseline(snapshot.trials)
    none = "no other configuration met the SLO" if not _searched(snapshot, TrialStatus.FEASIBLE) else ""
    if none and first is not None and first.status in (TrialStatus.INFEASIBLE, TrialStatus.CRASHED):
        none = "no configuration met the SLO, nor did the incumbent"
    stays = {
        Outcome.KEPT: f"The incumbent was kept: {none or 'no candidate was better by enough'}",
        Outcome.WORSE: "The incumbent was kept: the best candidate was worse when both were re-measured",
        Outcome.INCONCLUSIVE: "The incumbent was kept: the evidence that the candidate is better was inconclusive",
        Outcome.INTERRUPTED: "The run was interrupted before its decision; the incumbent was kept",
        Outcome.ABANDONED: "The run was abandoned before its decision; the incumbent was kept",
    }
    return Tone.STAYS, stays[outcome]


def _counts(snapshot: RunSnapshot) -> str:
    by_status = {status: sum(t.status is status for t in snapshot.trials) for status in TrialStatus}
    words = {
        TrialStatus.FEASIBLE: "feasible (met the SLO)",
        TrialStatus.INFEASIBLE: "infeasible (missed it)",
        TrialStatus.CRASHED: "crashed",
        TrialStatus.REFUSED: "refused by the guard before they were started",
        TrialStatus.ABORTED: "aborted",
        TrialStatus.RUNNING: "running",
    }
    counts = wording.listed([f"{by_status[status]} {what}" for status, what in words.items() if by_status[status]])
    if not snapshot.trials:
        return "No trial has been started."
    took = wording.duration(snapshot.until - snapshot.run.started_at)
    return f"{wording.plural(len(snapshot.trials), 'trial')} in {took}: {counts}."


def _searched(snapshot: RunSnapshot, status: TrialStatus) -> bool:
    return any(t.plan.role is Role.SEARCH and t.status is status for t in snapshot.trials)


def _left(snapshot: RunSnapshot) -> str:
    if snapshot.decision is not None or snapshot.alive:
        return ""
    return "`sloguard tune` continues it; `sloguard serve` ends it and serves the incumbent."


def _best(snapshot: RunSnapshot) -> str:
    if not any(t.plan.role is Role.SEARCH for t in snapshot.trials):
        return ""
    chosen, first = candidate_of(snapshot), baseline(snapshot.trials)
    objective = snapshot.setup.objective
    if first is None:
        serving = "the incumbent was not measured"
    elif objective_value(first) is None:
        had = {
            TrialStatus.INFEASIBLE: "was infeasible in its first trial",
            TrialStatus.CRASHED: "crashed in its first trial",
        }.get(first.status, "was not measured")
        serving = f"the incumbent {had}"
    else:
        missed = ", but missed a limit" if first.status is TrialStatus.INFEASIBLE else ""
        serving = f"the incumbent had {_value_text(first, objective)}{missed}"
    if chosen is None:
        if not _searched(snapshot, TrialStatus.FEASIBLE):
            return f"No trial of the search met the SLO; {serving}.{_nearest(snapshot)}"
        return f"No feasible trial of the search had a better {wording.OBJECTIVES[objective]}: {serving}."
    again = any(t.plan.role is Role.VALIDATION for t in snapshot.trials)
    return (
        f"The candidate, the best feasible trial of the search, is {chosen.number}: {wording.OBJECTIVES[objective]} "
        f"{_value_text(chosen, objective)}; {serving}. The best of many noisy trials"
        f" looks better than it is, so both {'were' if again else 'are to be'} re-measured, alternating."
    )


def _nearest(snapshot: RunSnapshot) -> str:
    """The trial that came nearest to the SLO, the limit in its way, and the rate at which it meets the SLO."""
    decided = snapshot.decision.nearest_miss if snapshot.decision is not None else None
    miss = decided or nearest_miss(snapshot.trials, snapshot.setup.slo)
    if miss is None:
        return ""
    about = "about " if miss.estimated else ""
    limit = wording.LIMITS[miss.limit]
    return f" Trial {miss.trial} came nearest: it exceeds {limit} by {about}{miss.excess:.0%}{miss.rates}."


def _reason(snapshot: RunSnapshot) -> str:
    decision = snapshot.decision
    return wording.sentence(decision.reason) if decision and decision.reason else ""


def _gain(snapshot: RunSnapshot) -> Gain | None:
    decision, rule = snapshot.decision, snapshot.setup.promotion
    if decision is None or decision.gain is None or decision.low is None or decision.high is None:
        return None
    if not math.isfinite(decision.gain + decision.low + decision.high):
        return None
    return Gain(decision.gain, decision.low, decision.high, rule.min_gain, rule.confidence)


def _checks(snapshot: RunSnapshot, incumbents: Sequence[Trial], candidates: Sequence[Trial]) -> tuple[Check, ...]:
    if not candidates:
        return ()
    rule, found = snapshot.setup.promotion, list[Check]()
    gain = _gain(snapshot)
    if gain is not None:
        found += [
            Check(
                "Better than the incumbent",
                f"lower bound of the gain above 0, at {rule.confidence:.0%} confidence",
                f"{gain.low:+.1%}",
                gain.low > 0,
            ),
            Check("Better by enough", f"an estimated gain of at least {rule.min_gain:.0%}", f"{gain.estimate:+.1%}",
                  gain.estimate >= rule.min_gain),
        ]  # fmt: skip
    analysis = _analysis(snapshot, incumbents, candidates)
    found += _failed_check(snapshot, analysis)
    pairs = min(len(incumbents), len(candidates))
    analyses = wording.listed([str(n) for n in rule.pairs])
    found.append(
        Check(
            "Enough A/B restarts",
            f"interim analyses after {analyses}",
            wording.plural(pairs, "A/B restart"),
            pairs >= rule.pairs[0],
        )
    )
    found += _limit_checks(snapshot, analysis)
    requests = sum(m.requests for t in candidates if (m := measurement_of(t)))
    found.append(
        Check(
            "Enough requests for a p99",
            f"{rule.requests_for_p99} measured with the candidate",
            str(requests),
            requests >= rule.requests_for_p99,
        )
    )
    return tuple(found)


def _analysis(snapshot: RunSnapshot, incumbents: Sequence[Trial], candidates: Sequence[Trial]) -> InterimAnalysis:
    """The interim analysis that decided; of a run in progress, the one with the present replicates."""
    setup, decision, pairs = snapshot.setup, snapshot.decision, len(candidates)
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


def _failed_check(snapshot: RunSnapshot, analysis: InterimAnalysis) -> list[Check]:
    """Whether the incumbent fails, so that no gain is needed."""
    rule = snapshot.setup.promotion
    again = [t for t in snapshot.trials if t.plan.role is Role.REFERENCE]
    crashed = sum(t.status is TrialStatus.CRASHED for t in again)
    rows = [margins_of(t, snapshot.setup.slo) for t in analysis.incumbents]
    if not rows and not crashed:
        return []
    missed = sum(max(row.values(), default=0.0) > 0 for row in rows)
    parts = [f"{missed} of {wording.plural(len(rows), 'start')} missed a limit"] if rows else []
    parts += [f"{wording.plural(crashed, 'start')} crashed"] if crashed else []
    asked = f"it surely misses a limit, at {rule.confidence:.0%} confidence over all limits, or crashes twice"
    what = "The incumbent fails (then no gain is needed)"
    fails = bool(analysis.missed_for_sure()) or crashed >= CRASHES_THAT_COUNT
    return [Check(what, asked, wording.listed(parts), fails if fails or len(rows) > 1 else None)]


def _limit_checks(snapshot: RunSnapshot, analysis: InterimAnalysis) -> list[Check]:
    """For each limit, the upper bound of the mean over the starts."""
    rule, slo = snapshot.setup.promotion, snapshot.setup.slo
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
                f"Meets the limit of {wording.LIMITS[limit.name]}",
                f"at most {wording.measured_text(limit.name, limit.limit)}, at {rule.slo_confidence:.0%} confidence",
                f"{bound}; worst start {wording.measured_text(limit.name, worst)}",
                # One start that exceeds it by more than the tolerance is enough.
                False if max(rows) > rule.tolerance else None if math.isinf(high) else high <= 0,
            )
        )
    return checks


def _bounded(name: str, limit: float, high: float) -> str:
    return f"mean over starts at most {wording.measured_text(name, max(limit * (1 + high), 0.0))}"


def _measured(measurement: Measurement, name: str) -> float:
    found = getattr(measurement, name)
    return math.inf if found is None else float(found)


def _pair(snapshot: RunSnapshot, incumbent: Trial, chosen: Trial) -> Pair:
    objective = snapshot.setup.objective
    ours, theirs = objective_value(incumbent), objective_value(chosen)
    ratio = "-"
    if ours and theirs and math.isfinite(ours) and math.isfinite(theirs):
        ratio = f"{(1 - theirs / ours) if objective is Objective.LATENCY else (theirs / ours - 1):+.1%}"
    left, right = (f"trial {t.number}: {_value_text(t, objective)}" for t in (incumbent, chosen))
    return Pair(left, right, ratio)


def measurement_of(trial: Trial) -> Measurement | None:
    """What its load measured, if it had one."""
    return trial.result.measurement if trial.result is not None else None


def _value_text(trial: Trial, objective: Objective) -> str:
    at_least = trial.result is not None and trial.result.value_is_lower_bound
    return wording.with_unit(objective_value(trial), objective, at_least=at_least)


def objective_value(trial: Trial) -> float | None:
    """The objective, higher is better; None if it was not measured."""
    return trial.result.value if trial.result is not None else None
