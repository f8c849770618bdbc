"""The states of `sloguard serve` and the allowed transitions, as one table."""

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


# The current configuration is being started.
COMING_UP = (State.STARTING, State.PROMOTING, State.RESTORING)
# A window is open, and can be aborted.
IN_A_WINDOW = (State.DRAINING, State.TUNING, State.VALIDATING)


class Cause(StrEnum):
    """Why a state was entered; the accompanying sentence in the journal and log is for people only."""

    STARTED = "started"  # the sidecar was started
    ENGINE_TAKEN_OVER = "engine_taken_over"
    ENGINE_CRASHED = "engine_crashed"
    ENGINE_HANGS = "engine_hangs"
    WINDOW_SCHEDULED = "window_scheduled"
    WINDOW_REQUESTED = "window_asked"
    WINDOW_REFUSED = "window_refused"  # by the before_drain hook
    WINDOW_ABORTED = "window_aborted"
    WINDOW_OUT_OF_TIME = "window_out_of_time"
    WINDOW_FAILED = "window_failed"
    DRAINED = "drained"
    CANDIDATE_FOUND = "best_found"
    PROMOTED = "promoted"
    KEPT = "kept"
    ROLLED_BACK = "rolled_back"
    STOPPED = "stopped"  # the sidecar is being stopped
    ENGINE_STOPPED = "engine_stopped"  # the sidecar has ended, and its engine with it
    ENGINE_LEFT = "engine_left"  # the sidecar has ended, its engine keeps serving
    FAILED = "failed"  # an error ended the sidecar


@dataclass(frozen=True)
class StateInfo:
    """A description of a state, whether /ready answers 200, and the states that may follow."""

    description: str
    successors: tuple[State, ...]
    ready: bool = False


TRANSITIONS: dict[State, StateInfo] = {
    State.STARTING: StateInfo(
        "the serving engine is adopted or started", (State.SERVING, State.RESTORING, State.HALTED)
    ),
    State.SERVING: StateInfo("vLLM serves and is probed", (State.DRAINING, State.RESTORING, State.HALTED), ready=True),
    State.DRAINING: StateInfo(
        "a window has opened: readiness is withdrawn, requests in flight finish",
        (State.SERVING, State.TUNING, State.RESTORING, State.HALTED),
    ),
    State.TUNING: StateInfo("trials are running", (State.VALIDATING, State.PROMOTING, State.RESTORING, State.HALTED)),
    State.VALIDATING: StateInfo(
        "the candidate and the incumbent are re-measured", (State.PROMOTING, State.RESTORING, State.HALTED)
    ),
    State.PROMOTING: StateInfo("the promoted configuration is started", (State.SERVING, State.RESTORING, State.HALTED)),
    State.RESTORING: StateInfo(
        "the current configuration (the promotion, or the file's arguments) is started, and retried until it is up",
        (State.SERVING, State.RESTORING, State.HALTED),
    ),
    State.HALTED: StateInfo("the sidecar has ended; its engine may keep serving", (State.STARTING,)),
}


class IllegalTransition(RuntimeError):  # noqa: N818 - it names what happened
    """A state transition that the table does not allow."""


def check_transition(before: State, after: State) -> None:
    """Raises IllegalTransition unless ``after`` may follow ``before``."""
    if after not in TRANSITIONS[before].successors:
        raise IllegalTransition(f"illegal transition: {before} to {after}")


def states_markdown() -> str:
    """The table as Markdown, for the documentation."""
    lines = ["| state | what it is | may be followed by |", "| --- | --- | --- |"]
    for state, row in TRANSITIONS.items():
        ready = " (`/ready` answers 200)" if row.ready else ""
        lines.append(f"| {state} | {row.description}{ready} | {', '.join(row.successors)} |")
    return "\n".join(lines)
