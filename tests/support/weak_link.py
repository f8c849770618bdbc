"""A link between a sidecar and an agent's Unix socket that can be cut, delayed, half-closed and frozen."""

import queue
import socket
import threading
import time
from contextlib import suppress
from enum import StrEnum
from pathlib import Path


class LinkState(StrEnum):
    """What the link does with what is sent."""

    WHOLE = "whole"
    CUT = "cut"  # connections are closed, and new ones refused
    SILENT = "silent"  # connections stay open, and nothing passes: a lost peer
    HALF_CLOSED = "half-closed"  # what the sidecar sends arrives, the answers do not


class WeakLink:
    """Forwards ``path`` to ``target``."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self._target = target
        self._state = LinkState.WHOLE
        self.delay_s = 0.0
        # How much was lost, refused connections included, and how much arrived late.
        self.lost = 0
        self.delayed = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"unix://{self.path}"

    def become(self, state: LinkState) -> None:
        self._state = state
        if state is LinkState.CUT:
            with self._lock:
                self.lost += bool(self._open)
                for one in self._open:
                    with suppress(OSError):
                        one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.become(LinkState.CUT)
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            try:
                if self._state is LinkState.CUT:
                    self.lost += 1
                    raise ConnectionRefusedError
                far.connect(str(self._target))
            except OSError:
                near.close()
                far.close()
                continue
            with self._lock:
                self._open |= {near, far}
            for source, sink, answers in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._forward, args=(source, sink, answers), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._deliver, args=(under_way, sink, answers), daemon=True).start()
        with suppress(OSError):
            while data := source.recv(65536):
                self.delayed += self.delay_s > 0
                under_way.put((time.monotonic() + self.delay_s, data))
        under_way.put((time.monotonic() + self.delay_s, b""))
        with self._lock:
            self._open.discard(source)
        source.close()

    def _deliver(self, under_way: "queue.SimpleQueue[tuple[float, bytes]]", sink: socket.socket, answers: bool) -> None:
        while True:
            due, data = under_way.get()
            time.sleep(max(due - time.monotonic(), 0.0))
            lost = self._state is LinkState.SILENT or (answers and self._state is LinkState.HALF_CLOSED)
            try:
                self.lost += bool(data) and lost
                if data and not lost:
                    sink.sendall(data)
                elif not data:
                    sink.shutdown(socket.SHUT_RDWR)
                    return
            except OSError:
                return
