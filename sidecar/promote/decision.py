"""The rule by which a configuration replaces the incumbent. Pure.

The search chooses the candidate (sidecar.promote.candidate); its measurements there enter no test. Candidate and
incumbent are then re-measured in pairs of ordinary starts in the same window; the first of a pair alternates:
incumbent, candidate, candidate, incumbent, ..., so that a drift of the machine favours neither. After the pairs in
``Promotion.pairs`` there is an interim analysis:

1. A candidate that crashes, or misses a limit by more than ``tolerance`` in one start, is out.
2. So is one whose gain is below ``min_gain`` even at its upper bound, or is unlikely to be shown by more pairs.
3. It is promoted when it surely meets every limit of the SLO and either is surely better, by an estimate of at least
   ``min_gain``; or the incumbent surely misses a limit, or has crashed twice.

Otherwise more pairs follow, until the last analysis or the end of the window. "Surely" is a one-sided bound of
Student's t over starts at an error of 1 - ``confidence``, for the candidate's limits 1 - ``slo_confidence``. That error
is divided over the interim analyses (sidecar.promote.statistics.error_level), over both ways to a promotion, and for an
incumbent that misses over its limits: by Boole's inequality all of them together promote a candidate that is neither
better nor needed at most that often. Logarithms of the objective count as normally distributed, starts as independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.config.schema import Config
from sidecar.promote.candidate import SearchedSpace, baseline, candidate
from sidecar.promote.interim_analysis import Conclusion, InterimAnalysis, margins_of
from sidecar.promote.nearest_miss import nearest_miss
from sidecar.record.decisions import Decision, NearestMiss, Outcome
from sidecar.record.trial import Role, Trial, TrialStatus

# A single crash of the incumbent may be an accident.
CRASHES_THAT_COUNT = 2


def next_role(trials: Sequence[Trial], config: Config) -> Role | None:
    """The role to measure next in the validation; None when there is nothing to validate, or enough is known."""
    chosen = candidate(trials, SearchedSpace.of(config))
    if chosen is None:
        return None
    validation = _Validation.of(trials, chosen)
    if validation.decision(config, last=False) is not None:
        return None
    ours, theirs = len(validation.incumbents), len(validation.candidates)
    if validation.incumbent_crashed or theirs < ours:
        return Role.VALIDATION
    return Role.REFERENCE if ours < theirs or ours % 2 == 0 else Role.VALIDATION


def missing(trials: Sequence[Trial], config: Config) -> int:
    """How many more measurements complete the first interim analysis, or this pair."""
    chosen = candidate(trials, SearchedSpace.of(config))
    if chosen is None:
        return 0
    validation = _Validation.of(trials, chosen)
    ours, theirs = len(validation.incumbents), len(validation.candidates)
    pairs = max(ours, theirs, config.promotion.pairs[0]) if ours != theirs else max(ours + 1, config.promotion.pairs[0])
    return pairs - theirs if validation.incumbent_crashed else 2 * pairs - ours - theirs


def decide(trials: Sequence[Trial], config: Config) -> Decision:
    """The decision on everything measured: after the search and, where there was a candidate, its validation."""
    chosen = candidate(trials, SearchedSpace.of(config))
    if chosen is None:
        incumbent, nearest = baseline(trials), nearest_miss(trials, config.slo)
        reason = _no_candidate(trials, incumbent, nearest)
        return Decision(Outcome.KEPT, reason, incumbent.number if incumbent else 0, nearest_miss=nearest)
    validation = _Validation.of(trials, chosen)
    # What stopped the validation is what decides; otherwise the window's end did.
    decision = validation.decision(config, last=False) or validation.decision(config, last=True)
    assert decision is not None
    return decision


def _no_candidate(trials: Sequence[Trial], incumbent: Trial | None, nearest: NearestMiss | None) -> str:
    """Why there is nothing to validate."""
    met = sum(t.status is TrialStatus.FEASIBLE for t in trials if t.plan.role is Role.SEARCH)
    if met:
        return f"none of the {met} configurations that met every limit was better than the incumbent"
    missed = incumbent is not None and incumbent.status is TrialStatus.INFEASIBLE
    said = f"no configuration met every limit{', nor did the incumbent' if missed else ''}"
    return said if nearest is None else f"{said}; {nearest}"


@dataclass(frozen=True)
class _Validation:
    """The validation's measurements of both, in the order of time."""

    chosen: Trial
    kept: int  # the trial that is served when the candidate is not promoted
    incumbents: tuple[Trial, ...]
    candidates: tuple[Trial, ...]
    incumbent_crashed: bool
    candidate_crashed: Trial | None

    @classmethod
    def of(cls, trials: Sequence[Trial], chosen: Trial) -> "_Validation":
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
        planned = config.promotion.pairs
        complete = self.incumbent_crashed or len(self.incumbents) == len(self.candidates)
        pairs = len(self.candidates) if self.incumbent_crashed else min(len(self.incumbents), len(self.candidates))
        pairs = min(pairs, planned[-1])
        analysis = InterimAnalysis(
            self.incumbents[:pairs],
            self.candidates[:pairs],
            config.slo,
            config.objective,
            config.promotion,
            last=last or pairs == planned[-1],
        )
        if out := self._out(config):
            return self._decided(Conclusion(Outcome.WORSE, out), analysis)
        if not last and not (complete and pairs in planned):
            return None
        if pairs < planned[0]:
            reason = f"the window had no time for the {planned[0]} pairs of starts that validate trial"
            return self._decided(
                Conclusion(Outcome.INCONCLUSIVE, f"{reason} {self.chosen.number}: there were {pairs}"), analysis
            )
        failed = self._failed(analysis)
        concluded = analysis.against_failing(failed) if failed else analysis.against_incumbent()
        return self._decided(concluded, analysis) if concluded else None

    def _decided(self, concluded: Conclusion, analysis: InterimAnalysis) -> Decision:
        estimate = concluded.estimate
        return Decision(
            concluded.outcome,
            concluded.reason,
            analysis.candidates[-1].number if concluded.outcome is Outcome.PROMOTED else self.kept,
            gain=estimate and estimate.gain,
            p_value=estimate and estimate.p_value,
            low=estimate and estimate.low,
            high=estimate and estimate.high,
            noise=estimate and estimate.noise,
            pairs=len(analysis.candidates),
            incumbents=tuple(t.number for t in analysis.incumbents),
            candidates=tuple(t.number for t in analysis.candidates),
        )

    def _out(self, config: Config) -> str:
        """Why the candidate is out whatever else was measured; empty when it is not."""
        if (crashed := self.candidate_crashed) is not None:
            return f"trial {self.chosen.number} crashed when it was re-measured (trial {crashed.number})"
        for trial in self.candidates:
            name, excess = max(margins_of(trial, config.slo).items(), key=lambda item: item[1])
            if excess > config.promotion.tolerance:
                return f"trial {self.chosen.number} missed {name} when it was re-measured (trial {trial.number})"
        return ""

    def _failed(self, analysis: InterimAnalysis) -> str:
        """How the incumbent fails so badly that the candidate need not be better; empty when it does not."""
        if self.incumbent_crashed:
            return f"crashed {CRASHES_THAT_COUNT} times"
        missed = analysis.missed_for_sure()
        return f"misses {missed[0]}" if missed else ""


def _measured(trials: Sequence[Trial], role: Role) -> tuple[Trial, ...]:
    ended = (t for t in trials if t.plan.role is role and t.status in (TrialStatus.FEASIBLE, TrialStatus.INFEASIBLE))
    return tuple(t for t in ended if t.result is not None and t.result.measurement is not None)
