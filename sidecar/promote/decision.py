"""The rule by which a configuration replaces what is serving. Pure.

The candidate is the best feasible trial of the search. That it was the luckiest of many is no evidence: what the search
measured chooses it, and enters no test. The candidate and the incumbent are then measured anew, in pairs of ordinary
starts in the same window, the first of a pair in turn (incumbent, candidate, candidate, incumbent, ...), so that a
drift of the machine favours neither. ``Promotion.pairs`` says after how many pairs there is a look at the evidence:

1. A candidate that crashes, or misses a limit by more than ``tolerance``, is out.
2. One whose gain is below ``min_gain``, or below 0, even at its upper bound is out.
3. It is promoted when it surely meets every limit of the SLO and either is surely better, by an estimate of at least
   ``min_gain``; or the incumbent surely misses the SLO, or has crashed twice.

Otherwise there are more pairs, until the last look or the window's end. "Surely" is a one-sided bound of Student's t
over starts (sidecar.promote.statistics), at a share of 1 - ``confidence``, for limits of 1 - ``slo_confidence``: each
of the k looks has 1/k of it, so that by Boole's inequality all of them together promote a candidate that is not better,
or does not meet the SLO, at most that often. Starts count as independent and normally distributed, logarithms for the
objective.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.config.schema import Config, Objective
from sidecar.config.slo import Slo
from sidecar.measure.capacity_search import TOLERANCE
from sidecar.promote.statistics import Comparison, confidence_bounds, request_error, welch
from sidecar.record.decisions import Decision, Outcome
from sidecar.record.trial import Role, Trial, TrialStatus, margins

# One crash of what serves may be an accident.
CRASHES_THAT_COUNT = 2
_MOST_LOG = 700.0  # whose exponential is still a number
# The standard deviation of a value that is known up to a factor: that of a uniform distribution.
_CAPACITY_NOISE = math.log(TOLERANCE) / math.sqrt(12)


def baseline(trials: Sequence[Trial]) -> Trial | None:
    """The incumbent's own trial in this run; one that was aborted is measured again."""
    ended = (t for t in reversed(trials) if t.plan.role is Role.BASELINE and t.status is not TrialStatus.ABORTED)
    return next(ended, None)


def candidate(trials: Sequence[Trial]) -> Trial | None:
    """The best feasible trial, the incumbent's excepted; None when nothing beats the incumbent even by chance."""
    incumbent = baseline(trials)
    feasible = [t for t in trials if t.status is TrialStatus.FEASIBLE and t.plan.role is Role.SEARCH]
    best = max(feasible, key=_value, default=None)
    if best is None or incumbent is None or incumbent.status is not TrialStatus.FEASIBLE:
        return best
    return best if _value(best) > _value(incumbent) else None


def next_role(trials: Sequence[Trial], config: Config) -> Role | None:
    """Whose turn it is to be measured in the validation; None when there is nothing to validate, or enough is known."""
    chosen = candidate(trials)
    if chosen is None:
        return None
    evidence = _Evidence.of(trials, chosen)
    if evidence.decision(config, last=False) is not None:
        return None
    ours, theirs = len(evidence.incumbents), len(evidence.candidates)
    if evidence.incumbent_crashed or theirs < ours:
        return Role.VALIDATION
    return Role.REFERENCE if ours < theirs or ours % 2 == 0 else Role.VALIDATION


def missing(trials: Sequence[Trial], config: Config) -> int:
    """How many more measurements the evidence needs before it can be looked at: to the first look, or of this pair."""
    chosen = candidate(trials)
    if chosen is None:
        return 0
    evidence = _Evidence.of(trials, chosen)
    ours, theirs = len(evidence.incumbents), len(evidence.candidates)
    pairs = max(ours, theirs, config.promotion.pairs[0]) if ours != theirs else max(ours + 1, config.promotion.pairs[0])
    return pairs - theirs if evidence.incumbent_crashed else 2 * pairs - ours - theirs


def decide(trials: Sequence[Trial], config: Config) -> Decision:
    """The decision with what there is: after the search and, where there was a candidate, its validation."""
    chosen = candidate(trials)
    if chosen is None:
        incumbent = baseline(trials)
        return Decision(Outcome.KEPT, _no_candidate(trials, incumbent), incumbent.number if incumbent else 0)
    decision = _Evidence.of(trials, chosen).decision(config, last=True)
    assert decision is not None
    return decision


def _no_candidate(trials: Sequence[Trial], incumbent: Trial | None) -> str:
    """Why the search has brought nothing to validate."""
    met = sum(t.status is TrialStatus.FEASIBLE for t in trials if t.plan.role is Role.SEARCH)
    if met:
        return f"none of the {met} configurations that met every limit was better than what serves"
    missed = incumbent is not None and incumbent.status is TrialStatus.INFEASIBLE
    return f"no configuration met every limit{', nor did what serves' if missed else ''}"


@dataclass(frozen=True)
class _Evidence:
    """What the validation has measured of both, in the order of time."""

    chosen: Trial
    kept: int  # the trial that is served when the candidate is not promoted
    incumbents: tuple[Trial, ...]
    candidates: tuple[Trial, ...]
    incumbent_crashed: bool
    candidate_crashed: Trial | None

    @classmethod
    def of(cls, trials: Sequence[Trial], chosen: Trial) -> "_Evidence":
        first = baseline(trials)
        crashed = [t for t in trials if t.status is TrialStatus.CRASHED]
        return cls(
            chosen=chosen,
            kept=first.number if first else 0,
            incumbents=_measured(trials, Role.REFERENCE),
            candidates=_measured(trials, Role.VALIDATION),
            incumbent_crashed=sum(t.plan.role is Role.REFERENCE for t in crashed) >= CRASHES_THAT_COUNT,
            candidate_crashed=next((t for t in crashed if t.plan.role is Role.VALIDATION), None),
        )

    def decision(self, config: Config, *, last: bool) -> Decision | None:
        """None when more pairs are needed; with ``last`` there will be none, and every doubt keeps the incumbent."""
        looks = config.promotion.pairs
        complete = self.incumbent_crashed or len(self.incumbents) == len(self.candidates)
        pairs = len(self.candidates) if self.incumbent_crashed else min(len(self.incumbents), len(self.candidates))
        pairs = min(pairs, looks[-1])
        look = _Look(self.incumbents[:pairs], self.candidates[:pairs], config, last=last or pairs == looks[-1])
        if out := self._out(config):
            found = _Finding(Outcome.WORSE, out)
        elif not last and not (complete and pairs in looks):
            return None
        elif pairs < looks[0]:
            reason = f"no time was left for the {looks[0]} pairs of starts that it takes to validate"
            found = _Finding(Outcome.INCONCLUSIVE, f"{reason} trial {self.chosen.number}: there were {pairs}")
        else:
            found = look.without(self._failed(look)) if self._failed(look) else look.against()
        if found is None:
            return None
        return Decision(
            found.outcome,
            found.reason,
            look.candidates[-1].number if found.outcome is Outcome.PROMOTED else self.kept,
            pairs=pairs,
            incumbents=tuple(t.number for t in look.incumbents),
            candidates=tuple(t.number for t in look.candidates),
            **({} if found.figures is None else dataclasses.asdict(found.figures)),
        )

    def _out(self, config: Config) -> str:
        """Why the candidate is out whatever else was measured; empty when it is not."""
        if (crashed := self.candidate_crashed) is not None:
            return f"trial {self.chosen.number} crashed when it was validated (trial {crashed.number})"
        for trial in self.candidates:
            name, excess = max(_margins(trial, config.slo).items(), key=lambda item: item[1])
            if excess > config.promotion.tolerance:
                return f"trial {self.chosen.number} missed {name} when it was validated (trial {trial.number})"
        return ""

    def _failed(self, look: "_Look") -> str:
        """What the incumbent did so badly that the candidate need not be better; empty when it did not."""
        if self.incumbent_crashed:
            return f"crashed {CRASHES_THAT_COUNT} times"
        missed = [name for name, (low, _) in look.limits(look.incumbents).items() if low > 0]
        return f"missed {missed[0]}" if missed else ""


@dataclass(frozen=True)
class _Figures:
    """As in Decision."""

    gain: float
    p_value: float
    low: float
    high: float
    noise: float


@dataclass(frozen=True)
class _Finding:
    """What a look led to."""

    outcome: Outcome
    reason: str
    figures: _Figures | None = None


@dataclass(frozen=True)
class _Look:
    """One look at complete pairs; ``last`` when there will be no other. Findings are None where more pairs may tell."""

    incumbents: tuple[Trial, ...]
    candidates: tuple[Trial, ...]
    config: Config
    last: bool

    def limits(self, starts: Sequence[Trial]) -> dict[str, tuple[float, float]]:
        """By limit, the bounds of the relative excess."""
        rule = self.config.promotion
        alpha = (1 - rule.slo_confidence) / len(rule.pairs)
        rows = [_margins(trial, self.config.slo) for trial in starts]
        return {name: confidence_bounds([row[name] for row in rows], alpha) for name in (rows[0] if rows else {})}

    def doubt(self) -> str:
        """Why the candidate does not surely meet the SLO; empty when it does."""
        confidence = self.config.promotion.slo_confidence
        requests = sum(t.result.measurement.requests for t in self.candidates if t.result and t.result.measurement)
        if requests < (needed := self.config.promotion.requests_for_p99):
            return f"too few requests for a p99: {requests} of {needed}"
        unsure = [name for name, (_, high) in self.limits(self.candidates).items() if high > 0]
        return f"not sure at confidence {confidence:.0%} to meet {unsure[0]}" if unsure else ""

    def without(self, failed: str) -> _Finding | None:
        """Where the incumbent ``failed``: then it suffices to meet the SLO."""
        doubt = self.doubt()
        if not doubt:
            reason = f"validated in {len(self.candidates)} fresh starts, meets the SLO; the incumbent {failed}"
            return _Finding(Outcome.PROMOTED, reason)
        return _Finding(Outcome.INCONCLUSIVE, f"the incumbent {failed}, the best is {doubt}") if self.last else None

    def against(self) -> _Finding | None:
        """Against what the incumbent measured beside it."""
        compared = self._compared()
        if compared is None:
            reason = "nothing to compare: a load had no answer that counts"
            return _Finding(Outcome.INCONCLUSIVE, reason) if self.last else None
        rule = self.config.promotion
        figures = _figures(compared, self.config.objective)
        numbers = _in_words(figures, len(self.candidates))
        if figures.high < 0:
            return _Finding(Outcome.WORSE, f"validated, the best is worse than the incumbent ({numbers})", figures)
        sure, enough = figures.low > 0, figures.gain >= rule.min_gain
        if figures.high < rule.min_gain or (self.last and sure and not enough):
            reason = f"validated, the best is not better by {rule.min_gain:.0%} ({numbers})"
            return _Finding(Outcome.KEPT, reason, figures)
        doubt = self.doubt() if sure and enough else f"too noisy to tell at confidence {rule.confidence:.0%}"
        if not doubt:
            reason = f"validated on fresh starts, better than the incumbent between them ({numbers})"
            return _Finding(Outcome.PROMOTED, reason, figures)
        return _Finding(Outcome.INCONCLUSIVE, f"{doubt} ({numbers})", figures) if self.last else None

    def _compared(self) -> Comparison | None:
        rule, objective = self.config.promotion, self.config.objective
        logs = [[_log(trial) for trial in starts] for starts in (self.incumbents, self.candidates)]
        if any(log is None for side in logs for log in side):
            return None
        ours, theirs = ([log for log in side if log is not None] for side in logs)
        if objective is Objective.CAPACITY:
            # What is known up to a factor deviates at least like a uniform distribution; its scores are of other rates.
            floor, shared = max(rule.noise, _CAPACITY_NOISE), 0.0
        else:
            floor, shared = rule.noise, request_error(*(_parts(side, objective) for side in self._sides()))
        alpha = (1 - rule.confidence) / len(rule.pairs)
        return welch(ours, theirs, alpha, floor=floor, request_error=shared)

    def _sides(self) -> tuple[tuple[Trial, ...], tuple[Trial, ...]]:
        return self.incumbents, self.candidates


def _measured(trials: Sequence[Trial], role: Role) -> tuple[Trial, ...]:
    ended = (t for t in trials if t.plan.role is role and t.status in (TrialStatus.FEASIBLE, TrialStatus.INFEASIBLE))
    return tuple(t for t in ended if t.result is not None and t.result.measurement is not None)


def _margins(trial: Trial, slo: Slo) -> dict[str, float]:
    assert trial.result is not None
    assert trial.result.measurement is not None
    return margins(trial.result.measurement, slo)


def _parts(starts: Sequence[Trial], objective: Objective) -> list[list[float]]:
    """By start and request, what the request adds to the objective: its seconds, or 1 when it met the SLO."""
    scores = [trial.result.scores for trial in starts if trial.result is not None]
    return [[1 - s for s in row] if objective is Objective.GOODPUT else list(row) for row in scores]


def _log(trial: Trial) -> float | None:
    """Of the objective, so that higher is better; None where there is no value, or the worst."""
    value = trial.result.value if trial.result is not None else None
    if value is None or value == 0 or math.isinf(value):
        return None
    return math.log(value) if value > 0 else -math.log(-value)


def _figures(compared: Comparison, objective: Objective) -> _Figures:
    """In terms of the objective: a share of the latency that is saved, or of the rate that is won."""

    def gain(log_ratio: float) -> float:
        within = max(-_MOST_LOG, min(log_ratio, _MOST_LOG))
        return -math.expm1(-within) if objective is Objective.LATENCY else math.expm1(within)

    estimate, low, high = (gain(log) for log in (compared.log_ratio, compared.low, compared.high))
    return _Figures(estimate, compared.p_value, low, high, compared.noise)


def _in_words(figures: _Figures, pairs: int) -> str:
    return (
        f"gain {figures.gain:+.1%}, from {figures.low:+.1%} to {figures.high:+.1%}; {pairs} pairs,"
        f" {figures.noise:.1%} between starts, p = {figures.p_value:.2g}"
    )


def _value(trial: Trial) -> float:
    assert trial.result is not None
    assert trial.result.value is not None
    return trial.result.value
