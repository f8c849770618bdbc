"""One interim analysis of the validation: its verdict on the pairs measured so far, and the reason in words. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sidecar.config.schema import Objective
from sidecar.config.slo import Slo
from sidecar.config.window import Promotion
from sidecar.measure.capacity_search import TOLERANCE
from sidecar.promote.statistics import (
    Comparison,
    chance_of_success,
    compare,
    confidence_bounds,
    error_level,
    request_error,
)
from sidecar.record.decisions import Outcome
from sidecar.record.trial import Trial, margins

# Of the error that a promotion may have, the part of "the incumbent misses the SLO"; "better" has the rest.
MISS_SHARE = 0.1
# More pairs are not worth their time where the chance that they lead to a promotion is below this.
MIN_CHANCE = 0.1
_MAX_LOG = 700.0  # whose exponential is still a number
# The standard deviation of a value that is known up to a factor: that of a uniform distribution.
_CAPACITY_NOISE = math.log(TOLERANCE) / math.sqrt(12)


@dataclass(frozen=True)
class GainEstimate:
    """As in sidecar.record.decisions.Decision."""

    gain: float
    p_value: float
    low: float
    high: float
    noise: float


@dataclass(frozen=True)
class Conclusion:
    """What an analysis led to."""

    outcome: Outcome
    reason: str
    estimate: GainEstimate | None = None


@dataclass(frozen=True)
class InterimAnalysis:
    """Complete pairs of starts under a rule; ``last`` where no other analysis follows.

    Conclusions are None where more pairs may decide.
    """

    incumbents: tuple[Trial, ...]
    candidates: tuple[Trial, ...]
    slo: Slo
    objective: Objective
    rule: Promotion
    last: bool

    def missed_for_sure(self) -> tuple[str, ...]:
        """The limits that the incumbent surely misses; all limits and analyses share the error."""
        rows = [margins_of(trial, self.slo) for trial in self.incumbents]
        limits = len(rows[0]) if rows else 1
        alpha = (1 - self.rule.confidence) * MISS_SHARE / (limits * len(self.rule.pairs))
        return tuple(name for name, (low, _) in _bounds(rows, alpha).items() if low > 0)

    def candidate_bounds(self) -> dict[str, tuple[float, float]]:
        """By limit, the bounds of the candidate's mean excess. No correction over limits: all have to be met."""
        rows = [margins_of(trial, self.slo) for trial in self.candidates]
        return _bounds(rows, (1 - self.rule.slo_confidence) / len(self.rule.pairs))

    def doubt(self) -> str:
        """Why the candidate does not surely meet the SLO; empty when it does."""
        measurements = (t.result.measurement for t in self.candidates if t.result)
        requests = sum(m.requests for m in measurements if m)
        if requests < (needed := self.rule.requests_for_p99):
            return f"too few requests for a p99: {requests} of {needed}"
        unsure = [name for name, (_, high) in self.candidate_bounds().items() if high > 0]
        return f"not sure at {self.rule.slo_confidence:.0%} confidence to meet {unsure[0]}" if unsure else ""

    def against_failing(self, failed: str) -> Conclusion | None:
        """Where the incumbent ``failed``: it suffices to meet the SLO.

        The limits come before a latency objective, so a candidate may be slower here; how much is in the reason.
        Goodput and capacity count what meets the SLO: one that is surely worse there misses it more often.
        """
        compared = self.comparison()
        estimate = self._estimate(compared) if compared else None
        numbers = f" ({self._words(estimate)})" if estimate else ""
        if estimate and estimate.high < 0 and self.objective is not Objective.LATENCY:
            reason = f"the incumbent {failed}, but the best candidate is worse{numbers}"
            return Conclusion(Outcome.WORSE, reason, estimate)
        doubt = self.doubt()
        if not doubt:
            starts = f"validated in {len(self.candidates)} fresh starts, meets the SLO"
            return Conclusion(Outcome.PROMOTED, f"{starts}; the incumbent {failed}{numbers}", estimate)
        if not self.last:
            return None
        return Conclusion(Outcome.INCONCLUSIVE, f"the incumbent {failed}, the best candidate is {doubt}", estimate)

    def against_incumbent(self) -> Conclusion | None:
        """Where the incumbent is to be beaten."""
        compared = self.comparison()
        if compared is None:
            reason = "nothing to compare: in one start no request succeeded"
            return Conclusion(Outcome.INCONCLUSIVE, reason) if self.last else None
        estimate = self._estimate(compared)
        concluded = self._verdict(compared, estimate)
        if concluded is None:
            return None
        outcome, reason = concluded
        return Conclusion(outcome, f"{reason} ({self._words(estimate)})", estimate)

    def _verdict(self, compared: Comparison, estimate: GainEstimate) -> tuple[Outcome, str] | None:
        rule = self.rule
        if estimate.high < 0:
            return Outcome.WORSE, "re-measured, the best candidate is worse"
        sure, enough = estimate.low > 0, estimate.gain >= rule.min_gain
        if estimate.high < rule.min_gain or (self.last and sure and not enough):
            return Outcome.KEPT, f"re-measured, the best candidate is not better by {rule.min_gain:.0%}"
        doubt = self.doubt() if sure and enough else f"too noisy to tell at {rule.confidence:.0%} confidence"
        if not doubt:
            return Outcome.PROMOTED, f"better in {compared.won} of {len(self.candidates)} A/B restarts"
        if self.last:
            return Outcome.INCONCLUSIVE, doubt
        if (chance := self._chance(compared)) < MIN_CHANCE:
            return Outcome.KEPT, (
                f"re-measured, the best candidate is not better by {rule.min_gain:.0%} so far, and the chance that more"
                f" pairs show it is {chance:.0%}"
            )
        return None

    def comparison(self) -> Comparison | None:
        """The objective of both sides; None where a start has no value."""
        sides = self.incumbents, self.candidates
        logs = [[_log(trial) for trial in starts] for starts in sides]
        if any(log is None for side in logs for log in side) or len(sides[0]) != len(sides[1]) or len(sides[0]) < 2:
            return None
        ours, theirs = ([log for log in side if log is not None] for side in logs)
        if self.objective is Objective.CAPACITY:
            # Known up to a factor, it varies at least like a uniform distribution; its scores are of other rates.
            floor, shared = max(self.rule.noise, _CAPACITY_NOISE), 0.0
        else:
            floor, shared = self.rule.noise, request_error(*(_parts(side, self.objective) for side in sides))
        alpha = error_level(self._better_error, self.rule.pairs, len(self.candidates), last=self.last)
        return compare(ours, theirs, alpha, floor=floor, request_error=shared)

    @property
    def _better_error(self) -> float:
        return (1 - self.rule.confidence) * (1 - MISS_SHARE)

    def _chance(self, compared: Comparison) -> float:
        """Of a promotion by the last of the planned analyses."""
        most = self.rule.pairs[-1]
        alpha = error_level(self._better_error, self.rule.pairs, most, last=True)
        least = self.rule.min_gain
        log_gain = -math.log1p(-least) if self.objective is Objective.LATENCY else math.log1p(least)
        return chance_of_success(compared, len(self.candidates) / most, alpha, log_gain)

    def _estimate(self, compared: Comparison) -> GainEstimate:
        """In terms of the objective: the share of a latency that is saved, or of a rate that is gained."""

        def gain(log_ratio: float) -> float:
            within = max(-_MAX_LOG, min(log_ratio, _MAX_LOG))
            return -math.expm1(-within) if self.objective is Objective.LATENCY else math.expm1(within)

        estimate, low, high = (gain(log) for log in (compared.log_ratio, compared.low, compared.high))
        return GainEstimate(estimate, compared.p_value, low, high, compared.noise)

    def _words(self, estimate: GainEstimate) -> str:
        return (
            f"gain {estimate.gain:+.1%}, from {estimate.low:+.1%} to {estimate.high:+.1%};"
            f" {len(self.candidates)} pairs, {estimate.noise:.1%} run-to-run spread, p = {estimate.p_value:.2g}"
        )


def margins_of(trial: Trial, slo: Slo) -> dict[str, float]:
    """By limit, how far a measured start is from it (sidecar.record.trial.margins)."""
    assert trial.result is not None
    assert trial.result.measurement is not None
    return margins(trial.result.measurement, slo)


def _bounds(rows: Sequence[Mapping[str, float]], alpha: float) -> dict[str, tuple[float, float]]:
    names = tuple(rows[0]) if rows else ()
    return {name: confidence_bounds([row[name] for row in rows], alpha) for name in names}


def _parts(starts: Sequence[Trial], objective: Objective) -> list[list[float]]:
    """By start and request, the request's part in the objective: its seconds, or 1 when it met the SLO."""
    scores = [trial.result.scores for trial in starts if trial.result is not None]
    return [[1 - s for s in row] if objective is Objective.GOODPUT else list(row) for row in scores]


def _log(trial: Trial) -> float | None:
    """Of the objective, so that higher is better; None where there is no value, or the worst."""
    value = trial.result.value if trial.result is not None else None
    if value is None or value == 0 or math.isinf(value):
        return None
    return math.log(value) if value > 0 else -math.log(-value)
