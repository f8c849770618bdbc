"""One-line texts about a trial: its configuration, latencies, and why it ended."""

import math
from collections.abc import Sequence

from sidecar.format import assignments, change
from sidecar.measure.capacity_search import RateResult, capacity
from sidecar.measure.measurement import Measurement
from sidecar.measure.steady_state import SteadyState
from sidecar.record.decisions import Outcome
from sidecar.record.trial import Role, Trial, TrialStatus

_MAX_EVIDENCE = 160  # characters
_MEASURED = (TrialStatus.FEASIBLE, TrialStatus.INFEASIBLE, TrialStatus.CRASHED)

OUTCOMES = {
    Outcome.PROMOTED: "promoted",
    Outcome.KEPT: "kept (no better candidate)",
    Outcome.WORSE: "kept (candidate worse)",
    Outcome.INCONCLUSIVE: "kept (inconclusive)",
    Outcome.INTERRUPTED: "interrupted",
    Outcome.ABANDONED: "abandoned",
}


def configuration(trial: Trial, knobs: Sequence[str]) -> str:
    """The knobs as they ran."""
    names = dict.fromkeys((*knobs, *trial.plan.proposed))
    return assignments(trial.args_that_ran, names)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_EVIDENCE else f"{text[: _MAX_EVIDENCE - 1].rstrip()}…"


def why(trial: Trial) -> str:
    """Notes beyond the numbers: refusal, crash category and evidence, early stop, repairs."""
    if trial.plan.refusal:
        return trial.plan.refusal
    if trial.result is not None and trial.result.crash is not None:
        crash = trial.result.crash
        return f"{crash.category} while {crash.phase}: {_cut(crash.evidence)}"
    if trial.result is not None and trial.result.unmeasured:
        return f"not measured: {trial.result.unmeasured}"
    repairs = "; ".join(f"{change(c.name, c.before, c.after)}: {c.reason}" for c in trial.plan.changes)
    notes = [repairs] if repairs else []
    if trial.result is not None and trial.result.stopped:
        notes.insert(0, f"stopped: {trial.result.stopped}")
    if trial.plan.role is Role.UNGUARDED:
        notes.append("unguarded")
    if trial.result is not None and trial.result.tried and capacity(trial.result.tried) is None:
        notes.append(f"capacity {capacity_text(trial.result.tried)}")
    measurement = trial.result.measurement if trial.result is not None else None
    return "; ".join([*notes, *(caveats(measurement) if measurement is not None else ())])


def caveats(measurement: Measurement) -> tuple[str, ...]:
    """Caveats of a load that was too short or too small."""
    notes: list[str] = []
    if measurement.steady is SteadyState.GROWING:
        notes.append("no steady state: requests arrived faster than they were answered")
    if measurement.steady is SteadyState.TOO_SHORT:
        notes.append("too short to show a steady state")
    if measurement.unresolved:
        names = ", ".join(interval.name for interval in measurement.unresolved)
        n, needed = min((i.n, i.needed) for i in measurement.unresolved)
        notes.append(f"{names} not resolved: n = {n}, {needed} needed")
    return tuple(notes)


def capacity_text(tried: Sequence[RateResult]) -> str:
    """The highest rate that met the SLO; marked with ≥ as a lower bound if no tested rate missed it."""
    found = capacity(tried)
    if found is None:
        return f"below {min(load.rate for load in tried):.3g} requests/s"
    return f"{'≥ ' if all(load.met for load in tried) else ''}{found:.3g} requests/s"


def misses_slo(trials: Sequence[Trial], outcome: Outcome | None) -> Trial | None:
    """The incumbent's trial that missed the SLO or crashed, if the incumbent is still the current configuration."""
    if outcome is Outcome.PROMOTED:
        return None
    measured = [t for t in trials if t.plan.role in (Role.BASELINE, Role.REFERENCE) and t.status in _MEASURED]
    return measured[-1] if measured and measured[-1].status is not TrialStatus.FEASIBLE else None


def milliseconds(value: float | None) -> str:
    """A latency, formatted for people."""
    if value is None:
        return "-"
    return "failed" if math.isinf(value) else f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"
