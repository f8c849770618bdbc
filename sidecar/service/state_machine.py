"""Where the service stands: each change of state is written before it is made, and shown by all who are asked."""

import time
from dataclasses import dataclass

from sidecar.format import Say
from sidecar.record.journal import Journal
from sidecar.record.states import TABLE, Cause, State, check_transition
from sidecar.service.mailbox import Mailbox
from sidecar.service.observer import ServiceObserver


@dataclass(frozen=True)
class Standing:
    """A state, why it was entered, and when, seconds since the epoch."""

    state: State
    why: str
    since: float


class StateMachine:
    """The present state, with its reason; ``window_end`` is in monotonic seconds, None outside of a window.

    Other threads read ``standing`` and ``time_left``.
    """

    def __init__(self, journal: Journal, metrics: ServiceObserver, requests: Mailbox, say: Say) -> None:
        self._journal = journal
        self._metrics = metrics
        self._requests = requests
        self.say = say
        self.standing = Standing(State.HALTED, "", time.time())
        self.window_end: float | None = None
        metrics.clock_window(self.time_left, self.overrun_s)

    @property
    def state(self) -> State:
        """The present one."""
        return self.standing.state

    def serves(self) -> bool:
        """Whether the service is up, as far as is known."""
        return self.state is State.SERVING

    def time_left(self) -> float:
        """Seconds until the window's end, 0 outside of one; also called by scrapes, on their threads."""
        end = self.window_end
        return 0.0 if end is None else max(end - time.monotonic(), 0.0)

    def overrun_s(self) -> float:
        """Seconds since the end of a window that has not come back, 0 otherwise; also called by scrapes."""
        end = self.window_end
        return 0.0 if end is None else max(time.monotonic() - end, 0.0)

    def enter(self, state: State, cause: Cause, why: str) -> None:
        """Goes on to ``state``; the same one for the same reason is no change. Raises Superseded."""
        if (state, why) == (self.standing.state, self.standing.why):
            return
        check_transition(self.state, state)
        until = time.time() + self.time_left() if self.window_end is not None else None
        # Serving comes before recording: what can't be written now is written later.
        if (error := self._journal.enter(str(state), why, until, str(cause))) is not None:
            self.say(str(error))
        self.standing = Standing(state, why, time.time())
        self._requests.state = state
        self._metrics.entered(state, ready=TABLE[state].ready, cause=cause)
        self.say(f"{state}: {why}")
