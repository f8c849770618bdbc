"""An HTTP server for one ASGI application, on a thread of its own, that slow clients cannot block.

uvicorn parses HTTP and runs the application. Two bounds are added below it, because no Python server we know has both:
a deadline for a whole request and a limit on open connections that still lets new clients in. (uvicorn's
limit_concurrency only acts once a request head is complete, and its keep-alive timeout after the first response;
hypercorn's keep_alive_timeout covers the head alone, and it has no limit.) They use asyncio's Protocol interface only,
so they do not depend on uvicorn's internals.
"""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from sidecar.format import Say
from vllm_sloguard.agent.engine_http import address

# Open connections of one server. More are kept for a moment, so that a new client in a flood has time for its request.
# At most MAX_AT_ONCE + BACKLOG of the usual 1,024 descriptors are in use: the rest is left for engines.
MAX_CONNECTIONS = 64
MAX_AT_ONCE = 400
# Connections that the kernel queues, so that a load balancer's does not wait a second or more to be retried.
BACKLOG = 100
_TRIM_AFTER_S = 0.1
# From a new connection, or the end of a response, to the end of the next request; also for a client that does not read.
REQUEST_DEADLINE_S = 5.0
_STOP_TIMEOUT_S = 3.0
_GRACE_S = 1

# As starlette.types has them, which are imported on the server's thread only: that takes a third of a second.
HttpScope = MutableMapping[str, Any]
HttpMessage = MutableMapping[str, Any]
HttpReceive = Callable[[], Awaitable[HttpMessage]]
HttpSend = Callable[[HttpMessage], Awaitable[None]]
AsgiApplication = Callable[[HttpScope, HttpReceive, HttpSend], Awaitable[None]]


@dataclass(frozen=True)
class HttpApplication:
    """What a server runs. ``background`` runs beside it until ``end_streams`` was called, which ends open responses."""

    asgi: AsgiApplication
    background: Callable[[], Coroutine[Any, Any, None]] | None = None
    end_streams: Callable[[], None] = lambda: None


class HttpServer:
    """Serves ``application``, which is made on the server's own thread, on ``listener``. ``say`` gets its failure."""

    def __init__(
        self, name: str, listener: socket.socket, application: Callable[[], HttpApplication], say: Say
    ) -> None:
        self._name = name
        self._listener = listener
        self._application = application
        self._say = say
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sloguard-{name}", daemon=True)
        self.host, self.port = listener.getsockname()[:2]

    @property
    def url(self) -> str:
        """Without a path."""
        return address(self.host, self.port)

    def start(self) -> None:
        """Begins; until the thread is ready, the kernel queues connections."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it with its connections; returns after a few seconds at most."""
        self._stopping.set()
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            with self._listener:
                asyncio.run(self._serve())
        except Exception as error:  # noqa: BLE001 - the boundary of the thread: the service continues without it
            self._say(f"the {self._name} server has failed: {type(error).__name__}: {error}")

    async def _serve(self) -> None:
        import uvicorn

        self._loop = asyncio.get_running_loop()
        if self._stopping.is_set():
            return
        application = self._application()
        limits = ConnectionLimits(REQUEST_DEADLINE_S)
        server = uvicorn.Server(
            uvicorn.Config(
                limits.around_application(application.asgi),
                http=cast("Any", limits.around_protocol),
                loop="asyncio",
                ws="none",
                lifespan="off",
                backlog=BACKLOG,
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_config=None,
                log_level="critical",
                timeout_graceful_shutdown=_GRACE_S,
            )
        )

        async def exit_when_asked() -> None:
            await self._stop.wait()
            application.end_streams()
            server.should_exit = True

        async with asyncio.TaskGroup() as tasks:
            if application.background is not None:
                tasks.create_task(application.background())
            tasks.create_task(exit_when_asked())
            await server.serve(sockets=[self._listener])
            self._stop.set()  # it may have ended by itself


class ConnectionLimits:
    """Bounds the connections of one server: their number, and the time a client takes for a request or to read.

    Beyond the limit, the oldest connections without a complete request are dropped, not the newest ones: silent
    clients never shut others out.
    """

    def __init__(self, deadline_s: float) -> None:
        self._trimming: asyncio.TimerHandle | None = None
        self.deadline_s = deadline_s
        self._open: dict[tuple[str, int], _BoundedConnection] = {}  # oldest first

    def around_protocol(self, **uvicorn_arguments: Any) -> asyncio.Protocol:
        """The factory that uvicorn calls for each connection."""
        from uvicorn.protocols.http.h11_impl import H11Protocol

        return _BoundedConnection(self, H11Protocol(**uvicorn_arguments))

    def around_application(self, asgi: AsgiApplication) -> AsgiApplication:
        """``asgi``, observed to know when a request is complete and when its response has ended."""

        async def bounded(scope: HttpScope, receive: HttpReceive, send: HttpSend) -> None:
            connection = self._open.get(_peer(scope.get("client")))
            if connection is None:
                return await asgi(scope, receive, send)
            if not _has_body(scope):
                connection.request_complete()

            async def observed() -> HttpMessage:
                message = await receive()
                if message["type"] == "http.request" and not message.get("more_body"):
                    connection.request_complete()
                return message

            try:
                return await asgi(scope, observed, send)
            finally:
                connection.response_ended()

        return bounded

    def admit(self, peer: tuple[str, int], connection: "_BoundedConnection") -> None:
        """Counts a new connection; drops others if there are too many."""
        self._open[peer] = connection
        self._drop_beyond(MAX_AT_ONCE)
        if len(self._open) > MAX_CONNECTIONS and self._trimming is None:
            self._trimming = asyncio.get_running_loop().call_later(_TRIM_AFTER_S, self._trim)

    def _trim(self) -> None:
        self._trimming = None
        self._drop_beyond(MAX_CONNECTIONS)

    def _drop_beyond(self, most: int) -> None:
        waiting = [one for one in self._open.values() if not one.answering]
        for one in waiting[: max(len(self._open) - most, 0)]:
            one.abort()

    def youngest(self, peer: tuple[str, int], connection: "_BoundedConnection") -> None:
        """Moves a connection to the end of the order in which they are dropped."""
        if self._open.pop(peer, None) is not None:
            self._open[peer] = connection

    def forget(self, peer: tuple[str, int]) -> None:
        """Takes note that it is closed."""
        self._open.pop(peer, None)


class _BoundedConnection(asyncio.Protocol):
    """One connection: passes everything to ``inner``, the protocol that speaks HTTP."""

    def __init__(self, limits: ConnectionLimits, inner: asyncio.Protocol) -> None:
        self._limits = limits
        self._inner = inner
        self._peer = ("", 0)
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self.answering = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._peer = _peer(transport.get_extra_info("peername"))
        self._inner.connection_made(transport)
        self._limits.admit(self._peer, self)
        # Closes the connection to a machine that went to sleep in the middle of a stream.
        opened: socket.socket = transport.get_extra_info("socket")
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._limits.deadline_s * 1000))
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()
        self._set_deadline()

    def resume_writing(self) -> None:
        self._inner.resume_writing()
        if self.answering:
            self._clear_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._limits.forget(self._peer)
        self._inner.connection_lost(exc)

    def request_complete(self) -> None:
        """The application has the whole request; from here on, the time it takes is ours."""
        self.answering = True
        self._clear_deadline()

    def response_ended(self) -> None:
        """The next request, if there is one, has its own deadline."""
        self.answering = False
        self._limits.youngest(self._peer, self)
        self._set_deadline()

    def abort(self) -> None:
        """Closes it at once."""
        self._clear_deadline()
        self._limits.forget(self._peer)
        if self._transport is not None:
            self._transport.abort()

    def _set_deadline(self) -> None:
        self._clear_deadline()
        if self._transport is not None and not self._transport.is_closing():
            self._deadline = asyncio.get_running_loop().call_later(self._limits.deadline_s, self.abort)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _peer(client: Any) -> tuple[str, int]:
    """The client's address and port, which name an open connection of one server."""
    return (str(client[0]), int(client[1])) if client else ("", 0)


def _has_body(scope: HttpScope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
