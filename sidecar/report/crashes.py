"""Crashes by cause, and the knob values that only crashed trials had. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.format import setting
from sidecar.record.run_snapshot import RunSnapshot, knobs_that_ran
from sidecar.record.trial import Trial, TrialStatus
from sidecar.report import wording
from vllm_sloguard.crash import Category
from vllm_sloguard.knobs import Value

_ABOUT = {
    Category.OUT_OF_MEMORY: "vLLM needed more memory than was free",
    Category.CUDA_ERROR: "the GPU or its driver reported an error",
    Category.STARTUP_FAILURE: "vLLM failed to start",
    Category.TIMEOUT: "it did not start or answer in time",
    Category.ENGINE_DEATH: "the engine exited without an error message",
}


@dataclass(frozen=True)
class CrashGroup:
    """Trials that crashed for the same cause; ``evidence`` is that of the first.

    ``alone`` names knobs with values that no measured trial had.
    """

    category: str
    about: str
    phase: str
    evidence: str
    numbers: tuple[int, ...]
    configuration: str
    alone: str


def groups(snapshot: RunSnapshot) -> tuple[CrashGroup, ...]:
    """The largest first."""
    found: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in snapshot.trials:
        crash = trial.result.crash if trial.result else None
        if crash is not None:
            cause = str(crash.category), crash.phase, re.sub(r"[0-9.]+", "#", crash.evidence)
            found.setdefault(cause, []).append(trial)
    measured = [t for t in snapshot.trials if t.status in (TrialStatus.FEASIBLE, TrialStatus.INFEASIBLE)]
    names = [knob.name for knob in snapshot.setup.knobs]
    made = (_group(snapshot, trials, measured, names) for trials in found.values())
    return tuple(sorted(made, key=lambda group: -len(group.numbers)))


def _group(
    snapshot: RunSnapshot, trials: Sequence[Trial], measured: Sequence[Trial], names: Sequence[str]
) -> CrashGroup:
    first = trials[0]
    assert first.result is not None
    assert first.result.crash is not None
    crash = first.result.crash
    incumbent = snapshot.run.incumbent
    different = {name: given for name, given in first.plan.args.items() if incumbent.get(name) != given}
    # An unguarded trial can crash by a knob that the search does not have.
    known = dict.fromkeys([*names, *(name for t in trials for name in t.plan.proposed)])
    found = (_alone(name, trials, measured) for name in known)
    return CrashGroup(
        category=wording.category(crash),
        about=_ABOUT[crash.category],
        phase=crash.phase,
        evidence=crash.evidence,
        numbers=tuple(t.number for t in trials),
        configuration=wording.arguments_text(different) or "as the incumbent",
        alone="; ".join(text for text in found if text),
    )


def _alone(name: str, crashed: Sequence[Trial], measured: Sequence[Trial]) -> str:
    """How the knob's values in ``crashed`` differ from those in ``measured``; empty if they overlap."""
    ours, theirs = ([knobs_that_ran(t, [name]).get(name) for t in side] for side in (crashed, measured))
    if not theirs or set(map(repr, ours)) & set(map(repr, theirs)):
        return ""
    numbers, others = _numbers(ours), _numbers(theirs)
    if len(numbers) < len(ours) or len(others) < len(theirs):
        values = wording.listed(sorted({setting(v, name) for v in ours}))
        return f"{name} = {values}, which no measured trial had"

    def shown(value: float) -> str:
        return setting(value, name)

    if min(numbers) > max(others):
        return f"{name} {shown(min(numbers))} or more; measured trials had {shown(max(others))} at most"
    if max(numbers) < min(others):
        return f"{name} {shown(max(numbers))} or less; measured trials had {shown(min(others))} at least"
    return ""


def _numbers(values: Sequence[Value | None]) -> list[int | float]:
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
