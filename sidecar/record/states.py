"""The states of `sloguard serve`, and the changes between them, as one table."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """What the sidecar is doing."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    TUNING = "tuning"
    VALIDATING = "validating"
    PROMOTING = "promoting"
    RESTORING = "restoring"
    HALTED = "halted"


# What is to serve is being started.
COMING_UP = (State.STARTING, State.PROMOTING, State.RESTORING)
# A window is open, and can be given up.
IN_A_WINDOW = (State.DRAINING, State.TUNING, State.VALIDATING)


class Cause(StrEnum):
    """Why a state was entered; the sentence beside it in the journal and the log is for people."""

    STARTED = "started"  # the sidecar was
    ENGINE_TAKEN_OVER = "engine_taken_over"
    ENGINE_CRASHED = "engine_crashed"
    ENGINE_HANGS = "engine_hangs"
    WINDOW_SCHEDULED = "window_scheduled"
    WINDOW_ASKED = "window_asked"
    WINDOW_REFUSED = "window_refused"  # by the hook before the drain
    WINDOW_ABORTED = "window_aborted"
    WINDOW_OUT_OF_TIME = "window_out_of_time"
    WINDOW_FAILED = "window_failed"
    DRAINED = "drained"
    BEST_FOUND = "best_found"
    PROMOTED = "promoted"
    KEPT = "kept"
    ROLLED_BACK = "rolled_back"
    STOPPED = "stopped"  # the sidecar is being stopped
    ENGINE_STOPPED = "engine_stopped"  # the sidecar has ended, and its engine with it
    ENGINE_LEFT = "engine_left"  # the sidecar has ended, its engine serves on
    FAILED = "failed"  # an error ended the sidecar


@dataclass(frozen=True)
class StateRow:
    """One line of the table: what a state is, whether /ready says so, and which states may follow it."""

    about: str
    after: tuple[State, ...]
    ready: bool = False


TABLE: dict[State, StateRow] = {
    State.STARTING: StateRow(
        "the engine that is to serve is looked for, or started", (State.SERVING, State.RESTORING, State.HALTED)
    ),
    State.SERVING: StateRow("vLLM serves, and is probed", (State.DRAINING, State.RESTORING, State.HALTED), ready=True),
    State.DRAINING: StateRow(
        "a window has opened: load balancers are told, requests in flight finish",
        (State.SERVING, State.TUNING, State.RESTORING, State.HALTED),
    ),
    State.TUNING: StateRow(
        "configurations are tried", (State.VALIDATING, State.PROMOTING, State.RESTORING, State.HALTED)
    ),
    State.VALIDATING: StateRow("the best one is measured again", (State.PROMOTING, State.RESTORING, State.HALTED)),
    State.PROMOTING: StateRow("the winner is started for serving", (State.SERVING, State.RESTORING, State.HALTED)),
    State.RESTORING: StateRow(
        "what is promoted, or the file's arguments, is started for serving, until it is up",
        (State.SERVING, State.RESTORING, State.HALTED),
    ),
    State.HALTED: StateRow("the sidecar has ended; its engine may serve on", (State.STARTING,)),
}


class IllegalTransition(RuntimeError):  # noqa: N818 - it names what happened
    """A change of state that the table does not have."""


def check_transition(before: State, after: State) -> None:
    """Raises IllegalTransition unless ``after`` may follow ``before``."""
    if after not in TABLE[before].after:
        raise IllegalTransition(f"{before} can't be followed by {after}")


def states_markdown() -> str:
    """The table, as the README has it."""
    lines = ["| state | what it is | may be followed by |", "| --- | --- | --- |"]
    for state, row in TABLE.items():
        ready = " (`/ready` answers 200)" if row.ready else ""
        lines.append(f"| {state} | {row.about}{ready} | {', '.join(row.after)} |")
    return "\n".join(lines)
