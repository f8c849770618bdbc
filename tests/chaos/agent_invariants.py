"""What must hold after every fault between a sidecar and its agent. Pure: judged from what was observed of one run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from sidecar.record.trial import Result, TrialStatus

BACK_WITHIN_S = 30.0
SETTLED_WITHIN_S = 150.0

TrialKey = tuple[int, int]  # run, number


@dataclass(frozen=True)
class ObservedTrial:
    """A trial in the journal."""

    status: TrialStatus
    result: Result | None = None


@dataclass(frozen=True)
class HeldBy:
    """Who had the agent's lease at one moment."""

    journal_id: str
    epoch: int


@dataclass(frozen=True)
class AgentRun:
    """One run. Times are seconds from the end of the fault, None for never.

    ``struck``: the fault has taken effect. ``engine_killed``: one crash is the fault itself. ``free_starts`` says of
    each start of an engine whether no other one was running. ``holders`` are in order; ``expected_holder`` must have
    the agent in the end.
    """

    struck: bool
    before: Mapping[TrialKey, ObservedTrial]
    after: Mapping[TrialKey, ObservedTrial]
    back_s: float | None
    settled_s: float | None
    free_starts: Sequence[bool]
    holders: Sequence[HeldBy] = field(default=())
    expected_holder: str = ""
    engine_killed: bool = False


def violations(run: AgentRun) -> list[str]:
    """The invariants that do not hold, one line each."""
    found: list[str] = []
    if not run.struck:
        found.append("the fault had no effect, so the run shows nothing")
    if run.back_s is None:
        found.append(f"{BACK_WITHIN_S:.0f} s after the fault nothing served, and no trial had ended")
    if run.settled_s is None:
        found.append(f"not serving {SETTLED_WITHIN_S:.0f} s after the fault")
    found += _trials(run)
    found += ["an engine was started while another one was running" for free in run.free_starts if not free]
    found += _controllers(run)
    return found


def _trials(run: AgentRun) -> list[str]:
    found = [f"trial {key} is lost" for key in run.before if key not in run.after]
    for key, trial in run.before.items():
        after = run.after.get(key)
        if trial.result is not None and after is not None and after.result != trial.result:
            found.append(f"the result of trial {key} has changed")
    found += [f"trial {key} still runs" for key, trial in run.after.items() if trial.status is TrialStatus.RUNNING]
    crashed = [key for key, trial in run.after.items() if trial.status is TrialStatus.CRASHED]
    if len(crashed) > run.engine_killed:
        found += [f"trial {key} counts as a crash" for key in crashed]
    return found


def _controllers(run: AgentRun) -> list[str]:
    found: list[str] = []
    newest: dict[str, int] = {}
    for holder in run.holders:
        if holder.epoch < newest.get(holder.journal_id, 0):
            found.append(f"epoch {holder.epoch} had the agent after epoch {newest[holder.journal_id]}")
        newest[holder.journal_id] = max(holder.epoch, newest.get(holder.journal_id, 0))
    journals = [holder.journal_id for holder in run.holders]
    turns = [*journals[:1], *(after for before, after in pairwise(journals) if before != after)]
    found += [f"journal {one} took the agent back" for one in dict.fromkeys(turns) if turns.count(one) > 1]
    if run.expected_holder and (not journals or journals[-1] != run.expected_holder):
        found.append(f"the agent is not with journal {run.expected_holder} in the end")
    return found
