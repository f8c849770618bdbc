"""Requests from other threads to the loop of `sloguard serve`, and the traffic they are checked against."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sidecar.observe.telemetry import TelemetryHub
from sidecar.observe.user_requests import RATE_OVER_S, rate
from sidecar.record.states import IN_A_WINDOW, State


@dataclass
class Mailbox:
    """Requests to the loop from other threads, and the loop's state as they see it."""

    stop_sidecar: threading.Event = field(default_factory=threading.Event)
    stop_engine: threading.Event = field(default_factory=threading.Event)
    retune: threading.Event = field(default_factory=threading.Event)
    abort: threading.Event = field(default_factory=threading.Event)
    state: State = State.HALTED
    engine_id: str = ""
    epoch: int = 0
    mismatch: str = ""  # why the serving engine does not match the journal
    # Held by other threads while they have the journal open, and by the loop while it restores its files.
    journal_connections: threading.Lock = field(default_factory=threading.Lock)
    deleted_journal_files: Callable[[], list[str]] = list[str]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _window_open: bool = False
    _abort_actions: list[int] = field(default_factory=list[int])

    def begin_window(self) -> None:
        """Aborts apply to this window from now on; stale ones are dropped."""
        with self._lock:
            self._window_open = True
            self._abort_actions.clear()
            self.abort.clear()

    def end_window(self) -> list[int]:
        """Stops accepting aborts for this window; returns the abort actions it received."""
        with self._lock:
            self._window_open = False
            self.abort.clear()
            return self._abort_actions.copy()

    def abort_window(self, action: int = 0) -> bool:
        """Aborts the open window on behalf of ``action``; False if none is open."""
        with self._lock:
            if not self._window_open:
                return False
            self.abort.set()
            if action:
                self._abort_actions.append(action)
            return True


def serving_rate(hub: TelemetryHub, engine_id: str) -> float | None:
    """Requests/s over the last five minutes; None with less than a minute of telemetry."""
    traffic = hub.traffic(engine_id)
    if traffic is None:
        return None
    return rate(traffic, time.monotonic(), RATE_OVER_S)


def busy_reason(asked: Mailbox) -> str:
    """Why no window can open in the present state; empty while serving."""
    if asked.state in (*IN_A_WINDOW, State.PROMOTING):
        return f"a window is open already: the sidecar is {asked.state}"
    if asked.state is State.HALTED:
        return "the sidecar is not up yet, or has stopped"
    if asked.state is not State.SERVING:
        return f"vLLM is not serving yet: the sidecar is {asked.state}; retry once it is serving"
    return asked.mismatch
