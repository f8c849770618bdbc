"""The steps of an open window, with the time at which each is expected to end. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sidecar.record.durations import mean_seconds
from sidecar.record.run_snapshot import Setup
from sidecar.record.states import State
from sidecar.record.trial import VALIDATING, StartKind, Trial, TrialStatus
from sidecar.record.trial_states import RAN_STATUSES

_STEPS = (("drain", "Drain"), ("search", "Search"), ("validate", "Validate"), ("restore", "Restore"))
_CURRENT = {
    State.DRAINING: 0,
    State.TUNING: 1,
    State.VALIDATING: 2,
    State.PROMOTING: 3,
    State.RESTORING: 3,
}


class StepStatus(StrEnum):
    """Where a step stands."""

    DONE = "done"
    CURRENT = "current"
    AHEAD = "ahead"


@dataclass(frozen=True)
class WindowStep:
    """One step; ``ends_at`` is when it is expected to end, seconds since the epoch, None if unknown or done."""

    name: str
    title: str
    status: StepStatus
    progress: str
    ends_at: float | None


def window_steps(state: State, since: float, setup: Setup | None, trials: Sequence[Trial]) -> tuple[WindowStep, ...]:
    """The steps of the window that is in ``state`` since ``since``; none outside a window."""
    current = _CURRENT.get(state)
    if current is None:
        return ()
    progress, ends = ("", "", "", ""), (None, None, None, None)
    if setup is not None:
        progress = ("", _searched(setup, trials), _validated(setup, trials), "")
        ends = _ends(current, since, setup, trials)
    return tuple(
        WindowStep(
            name=name,
            title=title,
            status=_status(n, current),
            progress=progress[n] if n <= current else "",
            ends_at=ends[n] if n >= current else None,
        )
        for n, (name, title) in enumerate(_STEPS)
    )


def next_analysis(setup: Setup, validated: Sequence[Trial]) -> int | None:
    """The number of replicates at the next interim analysis; None if unknown.

    A pair has two replicates; after a crash the number of pairs is not known here.
    """
    if any(t.status is TrialStatus.CRASHED for t in validated):
        return None
    return next((2 * pairs for pairs in setup.promotion.pairs if 2 * pairs > len(validated)), None)


def _status(step: int, current: int) -> StepStatus:
    if step == current:
        return StepStatus.CURRENT
    return StepStatus.DONE if step < current else StepStatus.AHEAD


def _split(trials: Sequence[Trial]) -> tuple[list[Trial], list[Trial]]:
    """Trials that ran: of the search, and of the validation."""
    ran = [t for t in trials if t.status in RAN_STATUSES]
    return [t for t in ran if t.plan.role not in VALIDATING], [t for t in ran if t.plan.role in VALIDATING]


def _searched(setup: Setup, trials: Sequence[Trial]) -> str:
    return f"{len(_split(trials)[0])} of {setup.budget} trials"


def _validated(setup: Setup, trials: Sequence[Trial]) -> str:
    validated = _split(trials)[1]
    most = next_analysis(setup, validated)
    return f"{len(validated)}{f' of {most}' if most else ''} starts" if validated or most else ""


def _ends(
    current: int, since: float, setup: Setup, trials: Sequence[Trial]
) -> tuple[float | None, float | None, float | None, float | None]:
    """When each step is expected to end, from the mean durations so far."""
    searched, validated = _split(trials)
    search_s = mean_seconds(searched)
    if search_s is None:
        return None, None, None, None
    last = max((t.ended_at for t in (*searched, *validated) if t.ended_at is not None), default=since)
    # Until a validation has run, a start of it is taken for as long as a trial of the search.
    validation_s = mean_seconds(validated) or search_s
    restore_s = max(
        (r.start_s or 0.0 for t in trials if (r := t.result) and r.start is StartKind.ORDINARY), default=0.0
    )
    search_end = last + max(setup.budget - len(searched), 0) * search_s if current <= 1 else last
    starts = (next_analysis(setup, validated) or len(validated)) - len(validated)
    validation_end = search_end + starts * validation_s if current <= 2 else since
    return None, search_end, validation_end, validation_end + restore_s if restore_s else None
