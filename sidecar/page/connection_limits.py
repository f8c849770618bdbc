"""Bounds on connections, so that whoever holds them open takes nothing that the service needs."""

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 64
# For a first request, and for taking in what was sent.
_PATIENCE_S = 10.0


class Bounded(H11Protocol):
    """One connection; it is cut off when there are too many, and when its client is silent or too slow."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadlines: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As asyncio calls it."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        opened = transport.get_extra_info("socket")
        # A machine that went to sleep does not keep its stream.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_PATIENCE_S * 1000))
        self._set("first request", self._silent)

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio calls it."""
        for name in tuple(self._deadlines):
            self._clear(name)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """As asyncio calls it: the client takes in less than it is sent."""
        super().pause_writing()
        self._set("reading", self.transport.abort)

    def resume_writing(self) -> None:
        """As asyncio calls it: it has caught up."""
        super().resume_writing()
        self._clear("reading")

    def _silent(self) -> None:
        if self.cycle is None:  # pyright: ignore[reportUnnecessaryComparison]
            self.transport.abort()

    def _set(self, name: str, then: Any) -> None:
        self._clear(name)
        self._deadlines[name] = self.loop.call_later(_PATIENCE_S, then)

    def _clear(self, name: str) -> None:
        if (deadline := self._deadlines.pop(name, None)) is not None:
            deadline.cancel()
