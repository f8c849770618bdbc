"""The plugin's telemetry client: a bounded queue, and a thread that sends it to the sidecar.

Rare events come through ``emit``, which never blocks and never raises, and are sent at once. What happens with every
step or request is collected from sources by the sending thread, so that vLLM's own thread does no work for it, and is
sent every few seconds: a call costs as much as hundreds of steps. What does not fit into the queue is dropped, oldest
first, and counted. Events are queued in their encoded form, of which a batch is put together without a copy of each.

gRPC must not be alive in a process that forks, and vLLM forks its engine and workers by default, so nothing touches
gRPC before ``open``, which a process calls when it will fork no more, or ``flush``, which it calls on its way down.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from vllm_sloguard.hooks.process_role import current_role
from vllm_sloguard.hooks.settings import Settings
from vllm_sloguard.wire import telemetry_pb2 as pb

if TYPE_CHECKING:
    import grpc

_DEADLINE_S = 2.0
# What sources have is digested this often, so that little piles up, and sent this often.
_DIGEST_S, _SEND_S = 1.0, 5.0
# An event that is emitted is sent this much later, with what follows it.
_GROUP_S = 0.05
_SHORTEST_WAIT_S = 0.2
_LONGEST_WAIT_S = 5.0
_BATCH_EVENTS = 500
_PUBLISH = "/sloguard.v1.TelemetryService/Publish"


def unix_target(path: str) -> str:
    """gRPC's name for the Unix socket at ``path``: it reads the name as a URI."""
    return f"unix:{quote(path)}"


_Collect = Callable[[], Iterable[pb.Event]]


@dataclass(frozen=True)
class _Batch:
    """An encoded PublishRequest, and how many events it has."""

    encoded: bytes
    events: int


class TelemetryClient:
    """Sends events to the sidecar, or nowhere when ``settings.socket`` is empty."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        # A forked child starts empty: its parent sends the events queued before the fork.
        self._queue: deque[bytes] = deque()
        self._sources: list[tuple[_Collect, _Collect]] = []
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._wake = threading.Event()
        self._channel: grpc.Channel | None = None
        self._thread: threading.Thread | None = None
        self._unsent: _Batch | None = None
        self._sequence = 0
        self.dropped = 0
        self.hook_errors = 0

    def add_source(self, digest: _Collect, totals: _Collect) -> None:
        """Has the sending thread call ``digest`` every second, and ``totals`` before it sends, for what is new."""
        self._sources.append((digest, totals))

    def emit(self, event: pb.Event) -> None:
        """Queues ``event``; stamps it with the time where it has none."""
        if not self.settings.socket:
            return
        self._enqueue([event])
        self._wake.set()

    def _enqueue(self, events: Iterable[pb.Event]) -> None:
        now, encoded = time.time(), list[bytes]()
        try:
            encoded.extend(_encoded(event, now) for event in events)
        finally:  # what came before a source's error is sent
            with self._lock:
                self._queue.extend(encoded)
                while len(self._queue) > self.settings.queue_events:
                    self._queue.popleft()
                    self.dropped += 1

    def open(self) -> None:
        """Starts the sending thread. Idempotent. To be called only where the process will not fork again."""
        if self.settings.socket and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sloguard-link", daemon=True)
            self._thread.start()

    def flush(self, timeout_s: float) -> None:
        """Sends what waits, for at most about ``timeout_s`` seconds; for a process on its way down."""
        if not self.settings.socket:
            return
        # In a separate thread, because a channel to a stopped peer can block beyond its deadline.
        sender = threading.Thread(target=self._send_all, args=(timeout_s,), daemon=True)
        sender.start()
        sender.join(timeout_s)

    def _run(self) -> None:
        wait_s, not_before, due = _SHORTEST_WAIT_S, 0.0, 0.0
        while True:
            if urgent := self._wake.wait(_DIGEST_S):
                time.sleep(_GROUP_S)
                self._wake.clear()
            now = time.monotonic()
            sends = now >= not_before and (urgent or now >= due or len(self._queue) >= _BATCH_EVENTS)
            try:
                emptied = self._tick(sends=sends)
            except Exception:  # noqa: BLE001 - the boundary to vLLM: this thread outlives whatever happens to it
                self.hook_errors += 1
                emptied = False
            if not sends:
                continue
            wait_s = _SHORTEST_WAIT_S if emptied else min(wait_s * 2, _LONGEST_WAIT_S)
            not_before = due = 0.0 if emptied else time.monotonic() + wait_s
            if emptied:
                due = now + _SEND_S

    def _tick(self, *, sends: bool) -> bool:
        """Takes what the sources have and, with ``sends``, sends it; whether the queue could be emptied."""
        if sends:
            return self._send_all(_DEADLINE_S)
        with self._sending:
            for digest, _ in self._sources:
                self._enqueue(digest())
        return False

    def _send_all(self, deadline_s: float) -> bool:
        """Whether the queue could be emptied."""
        with self._sending:
            for digest, totals in self._sources:
                self._enqueue(digest())
                self._enqueue(totals())
            while self._unsent is not None or self._next_batch():
                if not self._send(deadline_s):
                    return False
                self._unsent = None
        return True

    def _next_batch(self) -> bool:
        with self._lock:
            events = [self._queue.popleft() for _ in range(min(_BATCH_EVENTS, len(self._queue)))]
        if not events:
            return False
        self._sequence += 1
        head = pb.PublishRequest(
            engine_id=self.settings.engine_id,
            process=pb.Process(role=current_role(), pid=os.getpid()),
            sequence=self._sequence,
            dropped_events=self.dropped,
            hook_errors=self.hook_errors,
        )
        self._unsent = _Batch(b"".join([head.SerializeToString(), *events]), len(events))
        return True

    def _send(self, deadline_s: float) -> bool:
        import grpc

        assert self._unsent is not None
        if self._channel is None:
            self._channel = grpc.insecure_channel(
                unix_target(self.settings.socket), [("grpc.max_reconnect_backoff_ms", int(_LONGEST_WAIT_S * 1000))]
            )
        try:
            # A batch whose response was lost is sent again with the same number; the sidecar drops the duplicate.
            self._channel.unary_unary(_PUBLISH)(self._unsent.encoded, timeout=deadline_s)  # pyright: ignore
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return False
            # Rejected: it would be rejected again, and block the batches behind it.
            with self._lock:
                self.dropped += self._unsent.events
        return True


def _encoded(event: pb.Event, now: float) -> bytes:
    """A request with this event alone: joined, the encodings of requests are that of one with all their events."""
    if not event.time_unix_seconds:
        event.time_unix_seconds = now
    return pb.PublishRequest(events=[event]).SerializeToString()
