"""The service's state: each transition is journaled before it takes effect, then published to observers."""

import time
from dataclasses import dataclass

from sidecar.format import Say
from sidecar.record.journal import Journal
from sidecar.record.states import TRANSITIONS, Cause, State, check_transition
from sidecar.service.mailbox import Mailbox
from sidecar.service.observer import ServiceObserver


@dataclass(frozen=True)
class Standing:
    """A state, why it was entered, and since when (seconds since the epoch)."""

    state: State
    why: str
    since: float


class StateMachine:
    """The present state and its reason; ``window_end`` is in monotonic seconds, None outside a window.

    ``standing`` and ``time_left`` may be read from other threads.
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
        """The present state."""
        return self.standing.state

    def serves(self) -> bool:
        """Whether the service is believed to be up."""
        return self.state is State.SERVING

    def time_left(self) -> float:
        """Seconds until the window's end, 0 outside a window; also called from scrape threads."""
        end = self.window_end
        return 0.0 if end is None else max(end - time.monotonic(), 0.0)

    def overrun_s(self) -> float:
        """Seconds by which an unfinished window is overdue, else 0; also called from scrape threads."""
        end = self.window_end
        return 0.0 if end is None else max(time.monotonic() - end, 0.0)

    def enter(self, state: State, cause: Cause, why: str) -> None:
        """Enters ``state``; a no-op for the same state and reason. Raises Superseded."""
        if (state, why) == (self.standing.state, self.standing.why):
            return
        check_transition(self.state, state)
        until = time.time() + self.time_left() if self.window_end is not None else None
        # Failed writes are deferred: serving must not wait for the journal.
        if (error := self._journal.enter(str(state), why, until, str(cause))) is not None:
            self.say(str(error))
        self.standing = Standing(state, why, time.time())
        self._requests.state = state
        self._metrics.entered(state, ready=TRANSITIONS[state].ready, cause=cause)
        self.say(f"{state}: {why}")
