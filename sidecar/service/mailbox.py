"""What is asked of the loop of `serve`, and the load it is under."""

import threading
import time
from dataclasses import dataclass, field

from sidecar.observe.telemetry import TelemetryHub
from sidecar.observe.user_requests import RATE_OVER_S, rate
from sidecar.record.states import IN_A_WINDOW, State


@dataclass
class Mailbox:
    """What other threads ask of the loop, and what they need to know of it."""

    stop_sidecar: threading.Event = field(default_factory=threading.Event)
    stop_engine: threading.Event = field(default_factory=threading.Event)
    retune: threading.Event = field(default_factory=threading.Event)
    abort: threading.Event = field(default_factory=threading.Event)
    state: State = State.HALTED
    engine_id: str = ""
    epoch: int = 0
    mismatch: str = ""  # why the engine that serves is not what the journal says
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _window_open: bool = False
    _abort_orders: list[int] = field(default_factory=list[int])

    def begin_window(self) -> None:
        """From here on an abort is for this window; what was left of one for an earlier window is dropped."""
        with self._lock:
            self._window_open = True
            self._abort_orders.clear()
            self.abort.clear()

    def end_window(self) -> list[int]:
        """No abort is for this window any more; the orders that were."""
        with self._lock:
            self._window_open = False
            self.abort.clear()
            return self._abort_orders.copy()

    def abort_window(self, order: int = 0) -> bool:
        """Asks the open window to end, for the order of that number; False where none is open."""
        with self._lock:
            if not self._window_open:
                return False
            self.abort.set()
            if order:
                self._abort_orders.append(order)
            return True


def serving_rate(hub: TelemetryHub, engine_id: str) -> float | None:
    """Requests/s of the last five minutes; None where they were not watched for a minute."""
    traffic = hub.traffic(engine_id)
    if traffic is None:
        return None
    return rate(traffic, time.monotonic(), RATE_OVER_S)


def busy_reason(asked: Mailbox) -> str:
    """Why what the sidecar does now leaves no room for a window; empty where it serves."""
    if asked.state in (*IN_A_WINDOW, State.PROMOTING):
        return f"a window is open already: the sidecar is {asked.state}"
    if asked.state is State.HALTED:
        return "the sidecar is not up yet, or has ended"
    if asked.state is not State.SERVING:
        return f"vLLM does not serve yet: the sidecar is {asked.state}; ask again when it serves"
    return asked.mismatch
