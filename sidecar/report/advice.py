"""What to do after a run without a promotion, with figures. Pure."""

import math
from statistics import NormalDist

from sidecar.config.schema import Objective
from sidecar.promote.nearest_miss import nearest_miss
from sidecar.promote.statistics import error_level
from sidecar.record.decisions import Outcome
from sidecar.record.durations import seconds_a_trial
from sidecar.record.run_snapshot import RunSnapshot
from sidecar.record.trial import VALIDATING, Role, TrialStatus
from sidecar.record.wording import misses_slo
from sidecar.report import wording

# The chance with which a gain of the stated size would be found.
_POWER = 0.8
# More pairs than this are not worth their time.
_MAX_PAIRS = 32
_LESS_NOISE = "Reduce the spread: stop other load on the machine, or send more requests a trial (workload.requests)."


def slo_warning(snapshot: RunSnapshot) -> str:
    """That the current configuration misses the SLO, by how much; empty if it does not, or is of another run."""
    missing = misses_slo(snapshot.trials, snapshot.decision.outcome if snapshot.decision else None)
    in_effect = any(p.rolled_back_at is None for p in snapshot.promotions)
    if missing is None or in_effect or snapshot.run.id != max(snapshot.runs):
        return ""
    if missing.status is TrialStatus.CRASHED:
        return f"The current configuration crashed when it was measured (trial {missing.number})"
    return f"The current configuration misses your SLO (trial {missing.number})"


def run_advice(snapshot: RunSnapshot) -> tuple[str, ...]:
    """Sentences; none after a promotion or while the run is in progress."""
    decision = snapshot.decision
    if decision is None:
        return () if snapshot.alive else ("Continue the run: sloguard tune -c sloguard.yaml",)
    if decision.outcome is Outcome.PROMOTED:
        return ()
    if decision.outcome in (Outcome.INTERRUPTED, Outcome.ABANDONED):
        return ("Run it again: sloguard tune -c sloguard.yaml",)
    if not any(t.status is TrialStatus.FEASIBLE for t in snapshot.trials):
        return _nothing_feasible(snapshot)
    if decision.gain is not None and decision.noise is not None and decision.pairs >= 2:
        return _after_comparison(snapshot, decision.gain, decision.high or math.inf, decision.noise, decision.pairs)
    return (_more_trials(snapshot),)


def _nothing_feasible(snapshot: RunSnapshot) -> tuple[str, ...]:
    if all(t.status in (TrialStatus.CRASHED, TrialStatus.REFUSED) for t in snapshot.trials):
        return ("No trial was measured. Start with the first row under Crashes: fix what stops the incumbent.",)
    decided = snapshot.decision.nearest_miss if snapshot.decision is not None else None
    miss = decided or nearest_miss(snapshot.trials, snapshot.setup.slo)
    if miss is None:
        return (_more_trials(snapshot),)
    about = "about " if miss.estimated else ""
    limit, name = snapshot.setup.slo.upper_limits[miss.limit], wording.LIMITS[miss.limit]
    reached = wording.measured_text(miss.limit, limit * (1 + miss.excess))
    ways = [
        f"Nothing met the SLO. The nearest, trial {miss.trial}, reached {name} {about}{reached} against a limit of"
        f" {wording.measured_text(miss.limit, limit)}."
    ]
    if miss.highest_rate is not None:
        ways.append(
            f"It meets the SLO at {miss.highest_rate:.3g} requests/s instead of {snapshot.setup.workload.rate:g}: send"
            f" this engine less traffic, add engines, or raise the limit."
        )
    else:
        ways.append("Raise that limit, send this engine less traffic, or widen search.knobs.")
    return tuple(ways)


def _after_comparison(snapshot: RunSnapshot, gain: float, high: float, noise: float, pairs: int) -> tuple[str, ...]:
    rule = snapshot.setup.promotion
    if high < rule.min_gain:
        most = f"at most {high:+.1%}" if high > 0 else "negative"
        return (
            f"The candidate's gain is {most}; {rule.min_gain:+.0%} is required, and more pairs would not change that."
            f" {_more_trials(snapshot)}",
        )
    spread = f"The run-to-run spread was {noise:.0%}"
    if gain < rule.min_gain:
        estimate = f"The estimated gain is {gain:+.1%}; {rule.min_gain:+.0%} is required. {_more_trials(snapshot)}"
        smallest = detectable(rule.pairs[-1], noise, snapshot)
        if smallest <= rule.min_gain:
            return (estimate,)
        return estimate, f"{spread}: {rule.pairs[-1]} pairs can detect gains of {smallest:.0%} or more. {_LESS_NOISE}"
    needed = pairs_for(gain, noise, snapshot)
    if needed is None or needed <= pairs:
        smallest = detectable(_MAX_PAIRS, noise, snapshot)
        return (f"{spread}: even {_MAX_PAIRS} pairs could only detect gains of {smallest:.0%} or more. {_LESS_NOISE}",)
    seconds = 2 * (needed - pairs) * seconds_a_trial([t for t in snapshot.trials if t.plan.role in VALIDATING])
    setting = "" if needed in rule.pairs else f" (promotion.pairs: [{needed}])"
    return (
        f"{spread}: {needed} pairs would show {detectable(needed, noise, snapshot):+.0%}{setting}; about"
        f" {wording.duration(seconds)} more.",
    )


def detectable(pairs: int, noise: float, snapshot: RunSnapshot) -> float:
    """The smallest relative gain that ``pairs`` A/B restarts show with a chance of _POWER, at this spread."""
    rule, normal = snapshot.setup.promotion, NormalDist()
    alpha = error_level(1 - rule.confidence, [pairs], pairs, last=True)
    log = (normal.inv_cdf(1 - alpha) + normal.inv_cdf(_POWER)) * noise * math.sqrt(2 / pairs)
    return -math.expm1(-log) if snapshot.setup.objective is Objective.LATENCY else math.expm1(log)


def pairs_for(gain: float, noise: float, snapshot: RunSnapshot) -> int | None:
    """How many A/B restarts would show ``gain``; None if more than _MAX_PAIRS."""
    planned = [n for n in snapshot.setup.promotion.pairs if n <= _MAX_PAIRS]
    counts = sorted({*planned, *range(planned[-1] if planned else 3, _MAX_PAIRS + 1)})
    return next((n for n in counts if detectable(n, noise, snapshot) <= gain), None)


def _more_trials(snapshot: RunSnapshot) -> str:
    searched = sum(t.plan.role is Role.SEARCH for t in snapshot.trials)
    return (
        f"Only {wording.plural(searched, 'configuration')} of {wording.plural(len(snapshot.setup.knobs), 'knob')}"
        f" {'was' if searched == 1 else 'were'} tried: raise"
        " search.budget, or give search.knobs wider ranges."
    )
