"""How a trial reads in one line: its configuration, its latencies, why it ended."""

import math
from collections.abc import Sequence

from sidecar.format import assignments, change
from sidecar.record.decisions import Outcome
from sidecar.record.trial import Role, Trial

_MOST_EVIDENCE = 160  # characters

OUTCOMES = {
    Outcome.PROMOTED: "promoted",
    Outcome.KEPT: "kept (no clear winner)",
    Outcome.WORSE: "kept (candidate worse)",
    Outcome.INCONCLUSIVE: "kept (inconclusive)",
    Outcome.INTERRUPTED: "interrupted",
    Outcome.ABANDONED: "abandoned",
}


def configuration(trial: Trial, knobs: Sequence[str]) -> str:
    """The knobs as they ran."""
    ran = trial.plan.proposed if trial.plan.refusal else trial.plan.args
    names = dict.fromkeys((*knobs, *trial.plan.proposed))
    return assignments(ran, names)


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_EVIDENCE else f"{text[: _MOST_EVIDENCE - 1].rstrip()}…"


def why(trial: Trial) -> str:
    """What there is to say beyond the numbers: a refusal, a crash's category and evidence, an early end, repairs."""
    if trial.plan.refusal:
        return trial.plan.refusal
    if trial.result is not None and trial.result.crash is not None:
        crash = trial.result.crash
        return f"{crash.category} while {crash.phase}: {_cut(crash.evidence)}"
    repairs = "; ".join(f"{change(c.name, c.before, c.after)}: {c.reason}" for c in trial.plan.changes)
    notes = [repairs] if repairs else []
    if trial.result is not None and trial.result.stopped:
        notes.insert(0, f"stopped: {trial.result.stopped}")
    if trial.plan.role is Role.UNGUARDED:
        notes.append("past the guard")
    return "; ".join(notes)


def milliseconds(value: float | None) -> str:
    """A latency for people."""
    if value is None:
        return "-"
    return "failed" if math.isinf(value) else f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"
