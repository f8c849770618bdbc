"""Passes the plugins' calls (telemetry, live changes) on to the controller, which may be on another machine.

The plugins call a Unix socket of the agent. The controller holds a stream open, receives the calls on it and sends the
answers back; without a controller the plugins get UNAVAILABLE, as from a sidecar that is not running.
"""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

import grpc

_METHODS = frozenset({"/sloguard.v1.TelemetryService/Publish", "/sloguard.v1.LiveService/Await"})
_MAX_WAITING = 128
_LONGEST_S = 60.0
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True)
class PluginCall:
    """A plugin's call."""

    number: int
    method: str
    request: bytes
    timeout_s: float


class RelayedError(RuntimeError):
    """The controller's error for a call."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = _CODES.get(code, grpc.StatusCode.UNKNOWN)


class RelaySession:
    """The stream of one controller."""

    def __init__(self) -> None:
        self._calls: queue.Queue[PluginCall | None] = queue.Queue(_MAX_WAITING)
        self._answers: dict[int, Future[bytes]] = {}
        self._lock = threading.Lock()
        self._number = 0
        self.ended = False

    def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """The controller's answer. Raises RelayedError, TimeoutError, ConnectionError."""
        answer: Future[bytes] = Future()
        with self._lock:
            if self.ended:
                raise ConnectionError("the controller is gone")
            self._number += 1
            number = self._number
            self._answers[number] = answer
        try:
            self._calls.put_nowait(PluginCall(number, method, request, timeout_s))
            return answer.result(timeout_s)
        except queue.Full:
            raise ConnectionError("too many calls are waiting for the controller") from None
        except FutureTimeoutError:
            raise TimeoutError("the controller did not answer") from None
        finally:
            with self._lock:
                self._answers.pop(number, None)

    def calls(self) -> Iterator[PluginCall]:
        """The calls as they come, until the session ends."""
        while not self.ended and (call := self._calls.get()) is not None:
            yield call

    def answered(self, number: int, answer: bytes, code: int, error: str) -> None:
        """Delivers an answer; one that nobody waits for any more is dropped."""
        with self._lock:
            waiting = self._answers.pop(number, None)
        if waiting is None:
            return
        if code:
            waiting.set_exception(RelayedError(code, error))
        else:
            waiting.set_result(answer)

    def end(self) -> None:
        """Ends the session; waiting calls fail."""
        with self._lock:
            self.ended = True
            waiting = list(self._answers.values())
            self._answers.clear()
        for answer in waiting:
            answer.set_exception(ConnectionError("the controller is gone"))
        try:
            self._calls.put_nowait(None)
        except queue.Full:
            self._calls.get_nowait()
            self._calls.put_nowait(None)


class PluginRelay:
    """The session of the latest controller, and the gRPC handler that the plugins call."""

    def __init__(self) -> None:
        self._session: RelaySession | None = None
        self._lock = threading.Lock()

    def open(self) -> RelaySession:
        """A session that replaces the present one."""
        session = RelaySession()
        with self._lock:
            before, self._session = self._session, session
        if before is not None:
            before.end()
        return session

    def close(self) -> None:
        """Ends the session."""
        with self._lock:
            before, self._session = self._session, None
        if before is not None:
            before.end()

    def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """Raises RelayedError, TimeoutError, ConnectionError."""
        session = self._session
        if session is None:
            raise ConnectionError("there is no controller")
        return session.call(method, request, timeout_s)

    def add_to(self, server: grpc.Server) -> None:
        """Registers the plugins' services."""
        server.add_generic_rpc_handlers((_RelayHandler(self),))


class _RelayHandler(grpc.GenericRpcHandler):
    """Handles the plugins' methods without decoding their messages."""

    def __init__(self, relay: PluginRelay) -> None:
        self._relay = relay

    def service(self, handler_call_details: Any) -> Any:
        method = str(handler_call_details.method)
        if method not in _METHODS:
            return None

        def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
            left = context.time_remaining()
            try:
                return self._relay.call(method, request, min(left or _LONGEST_S, _LONGEST_S))
            except RelayedError as error:
                context.abort(error.code, str(error))
            except TimeoutError as error:
                context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
            except ConnectionError as error:
                context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            raise AssertionError("abort raises")

        return grpc.unary_unary_rpc_method_handler(handle)  # pyright: ignore[reportUnknownVariableType]
