"""Serves the page from a thread of its own, beside a service that never waits for it."""

import asyncio
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress

from sidecar.config.schema import PageConfig
from sidecar.engine.ports import port_owner
from sidecar.format import Say, address
from sidecar.page.event_stream import Feed, Sources
from sidecar.page.token import path_of, token_of

_GRACE_S = 1
_PATIENCE_S = 3.0


@contextmanager
def served(sources: Sources, say: Say) -> Generator[None]:
    """The page, where the configuration has it. Raises OSError for a port that is taken, ConfigError for a token."""
    config = sources.config
    if not config.page.enabled:
        yield
        return
    token = token_of(config, say) if config.page.takes_orders else None
    listener = _listener(config.page)
    page = _Page(sources, listener, token, say)
    host, port = listener.getsockname()[:2]
    say(f"page: {address(host, port)}/")
    page.start()
    try:
        yield
    finally:
        page.stop()


def _listener(where: PageConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    try:
        return socket.create_server((where.host, where.port), family=family)
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]  # then it names the address again
        raise OSError(f"page: {where.host}:{where.port}: {why}{port_owner(where.port)}") from None


class _Page:
    """The thread, with its event loop."""

    def __init__(self, sources: Sources, listener: socket.socket, token: str | None, say: Say) -> None:
        self._sources = sources
        self._listener = listener
        self._token = token
        self._say = say
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="sloguard-page", daemon=True)

    def start(self) -> None:
        """Begins; connections wait until the thread is ready for them."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it, with what is open; the service does not wait for long."""
        self._stopping.set()
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        try:
            with self._listener:
                asyncio.run(self._serve())
        except Exception as error:  # noqa: BLE001 - the boundary of the page: the service goes on without it
            self._say(f"the page has ended: {type(error).__name__}: {error}")

    async def _serve(self) -> None:
        # They take a third of a second, in which the service has better things to do.
        import uvicorn

        from sidecar.page.access_control import Gate
        from sidecar.page.app import application, static_files, version_of
        from sidecar.page.connection_limits import Bounded

        self._loop = asyncio.get_running_loop()
        if self._stopping.is_set():
            return
        config, static = self._sources.config, static_files()
        orders = str(path_of(config)) if self._token is not None else ""
        feed = Feed(self._sources, self._say, version=version_of(static), orders=orders)
        gate = Gate(application(config, feed, static), self._token, config.page.hosts, self._say)
        server = uvicorn.Server(
            uvicorn.Config(
                gate,
                http=Bounded,
                loop="asyncio",
                ws="none",
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_config=None,
                log_level="critical",  # the gate and the feed say what there is to say
                timeout_graceful_shutdown=_GRACE_S,
            )
        )

        async def end_when_asked() -> None:
            await self._stop.wait()
            feed.end()
            server.should_exit = True

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(feed.run())
            tasks.create_task(end_when_asked())
            await server.serve(sockets=[self._listener])
            # It may have ended by itself.
            self._stop.set()
