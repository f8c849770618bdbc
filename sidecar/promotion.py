"""The rule by which a configuration replaces what is serving. Pure.

The candidate is the best feasible trial. It is started afresh and measured again; it replaces the incumbent when, in
that second measurement,

1. it meets the SLO, and the incumbent, measured in the same run, either does not or is worse by at least ``min_gain``
   of the objective (one that crashes is tried twice); and
2. where the incumbent meets the SLO, its requests are slower (or miss the SLO more often) than the candidate's by a
   one-sided Mann-Whitney U test at ``confidence``.

Measuring again takes away the luck of the best of many; the incumbent's own record is of the same run, never an old
one. Requests of one load are not independent, which makes the test too sure: ``min_gain`` is what guards against noise
between starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sidecar.config import Promotion
from sidecar.trial import Role, Status, Trial


class Outcome(StrEnum):
    """What the run led to."""

    PROMOTED = "promoted"
    KEPT = "incumbent kept"


@dataclass(frozen=True)
class Decision:
    """The outcome, in words, with its numbers. ``trial`` is the number of the trial that is served from now on."""

    outcome: Outcome
    reason: str
    trial: int
    gain: float | None = None
    p_value: float | None = None


def baseline(trials: Sequence[Trial]) -> Trial | None:
    """The incumbent's own trial in this run; one that was aborted is measured again."""
    ended = (t for t in reversed(trials) if t.plan.role is Role.BASELINE and t.status is not Status.ABORTED)
    return next(ended, None)


def candidate(trials: Sequence[Trial]) -> Trial | None:
    """The best feasible trial, the incumbent's excepted; None when nothing beats the incumbent even by chance."""
    incumbent = baseline(trials)
    feasible = [t for t in trials if t.status is Status.FEASIBLE and t.plan.role is Role.SEARCH]
    best = max(feasible, key=_value, default=None)
    if best is None or incumbent is None or incumbent.status is not Status.FEASIBLE:
        return best
    return best if _value(best) > _value(incumbent) else None


def decide(trials: Sequence[Trial], rule: Promotion) -> Decision:
    """The decision after the search and, where there was a candidate, its validation."""
    incumbent = baseline(trials)
    number = incumbent.number if incumbent else 0
    chosen = candidate(trials)
    if chosen is None:
        ran = sum(t.status is Status.FEASIBLE for t in trials if t.plan.role is Role.SEARCH)
        return Decision(Outcome.KEPT, f"none of {ran} feasible configurations was better in its first trial", number)
    again = next((t for t in reversed(trials) if t.plan.role is Role.VALIDATION), None)
    if again is None:
        return Decision(Outcome.KEPT, f"no time was left to validate trial {chosen.number}", number)
    if again.status is not Status.FEASIBLE:
        reason = f"trial {chosen.number} was {again.status} when it was validated (trial {again.number})"
        return Decision(Outcome.KEPT, reason, number)
    if incumbent is None or incumbent.status is not Status.FEASIBLE:
        was = incumbent.status if incumbent else "not measured"
        reason = f"trial {chosen.number} meets the SLO, twice; the incumbent was {was}"
        return Decision(Outcome.PROMOTED, reason, again.number)
    return _compare(incumbent, again, rule)


def _compare(incumbent: Trial, again: Trial, rule: Promotion) -> Decision:
    gain = (_value(again) - _value(incumbent)) / abs(_value(incumbent)) if _value(incumbent) else 0.0
    p_value = _p_slower(incumbent, again)
    numbers = f"gain {gain:+.1%}, p = {p_value:.2g}"
    if gain < rule.min_gain:
        reason = f"validated, the best is not better by {rule.min_gain:.0%} ({numbers})"
        return Decision(Outcome.KEPT, reason, incumbent.number, gain, p_value)
    if p_value > 1 - rule.confidence:
        reason = f"validated, the best is not better at confidence {rule.confidence:.0%} ({numbers})"
        return Decision(Outcome.KEPT, reason, incumbent.number, gain, p_value)
    reason = f"validated on a fresh start, better than the incumbent of the same run ({numbers})"
    return Decision(Outcome.PROMOTED, reason, again.number, gain, p_value)


def _p_slower(incumbent: Trial, again: Trial) -> float:
    """One-sided p-value of "the incumbent's requests are not worse"."""
    assert incumbent.result is not None
    assert again.result is not None
    if not incumbent.result.scores or not again.result.scores:
        return 1.0
    # Imported here: it takes longer than all else that a command imports.
    from scipy.stats import mannwhitneyu  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    test = mannwhitneyu(incumbent.result.scores, again.result.scores, alternative="greater")
    return float(test.pvalue)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def _value(trial: Trial) -> float:
    assert trial.result is not None
    assert trial.result.value is not None
    return trial.result.value
