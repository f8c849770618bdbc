"""The states of `sloguard serve`, and the changes between them, as one table."""

from enum import StrEnum


class State(StrEnum):
    """What the sidecar is doing."""

    STARTING = "starting"  # the engine that is to serve starts
    SERVING = "serving"
    DRAINING = "draining"  # no longer ready; requests in flight finish
    TUNING = "tuning"
    VALIDATING = "validating"
    PROMOTING = "promoting"  # the winner is started for serving
    RESTORING = "restoring"  # what served before is started again
    HALTED = "halted"  # the sidecar has ended


ALLOWED: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.SERVING, State.RESTORING, State.HALTED}),
    State.SERVING: frozenset({State.DRAINING, State.RESTORING, State.HALTED}),
    State.DRAINING: frozenset({State.SERVING, State.TUNING, State.RESTORING, State.HALTED}),
    State.TUNING: frozenset({State.VALIDATING, State.PROMOTING, State.RESTORING, State.HALTED}),
    State.VALIDATING: frozenset({State.PROMOTING, State.RESTORING, State.HALTED}),
    State.PROMOTING: frozenset({State.SERVING, State.RESTORING, State.HALTED}),
    State.RESTORING: frozenset({State.SERVING, State.RESTORING, State.HALTED}),
    State.HALTED: frozenset({State.STARTING}),
}


class IllegalTransition(RuntimeError):  # noqa: N818 - it names what happened
    """A change of state that the table does not have."""


def check(before: State, after: State) -> None:
    """Raises IllegalTransition unless ``after`` may follow ``before``."""
    if after not in ALLOWED[before]:
        raise IllegalTransition(f"{before} can't be followed by {after}")
