"""Sends streamed completions and times their tokens, with little CPU: the load client shares its cores with the engine.

Stands in for the request function of vLLM's benchmark, which decodes every token twice in a general HTTP client: on a
machine of few cores, requests were sent late. This one fills the same record by the same definitions. It reads the
clock once per read, looks for tokens without decoding them, and sends the head and body of a request in one write.
Connections are kept and reused.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

# In a token's text the quotes are escaped, so these bytes are the beginning of an event's choices.
_CHOICE = b'"choices":[{'
_END_OF_EVENT = b"\n\n"
_MOST_REST_BYTES = 2**20  # of an error, or of an event that has not ended


class CompletionError(RuntimeError):
    """The server's answer is no completion; the text is the reason."""


class _Answer:
    """The answer to one request as it arrives, by the callbacks of httptools; times go into ``record``."""

    def __init__(self, record: Any) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.complete = False
        self.begun = False
        self.keeps_connection = False
        self._record = record
        self._tokens = 0
        self._last_s = record.start_time
        self._now_s = 0.0
        self._rest = b""
        self._error = ""

    def feed(self, content: bytes) -> None:
        """Takes what was read from the connection. Raises HttpParserError, CompletionError."""
        self._now_s = time.perf_counter()
        self.begun = True
        self.parser.feed_data(content)
        if self.parser.get_status_code() == 200:
            *events, self._rest = self._rest.split(_END_OF_EVENT)
            for event in events:
                self._event(event)

    def on_body(self, body: bytes) -> None:
        """Called by the parser with a part of the body."""
        if len(self._rest) < _MOST_REST_BYTES:
            self._rest += body

    def on_message_complete(self) -> None:
        """Called by the parser at the end of the answer."""
        self.complete = True
        self.keeps_connection = self.parser.should_keep_alive()

    def finish(self) -> None:
        """Completes the record. Raises CompletionError if the answer was none."""
        status = self.parser.get_status_code()
        if status != 200:
            raise CompletionError(f"HTTP {status}: {' '.join(self._rest.decode(errors='replace').split())[:300]}")
        if self._rest.strip():
            self._event(self._rest)
        if self._error or not self._tokens:
            raise CompletionError(self._error or "an answer without a token")
        self._record.latency = self._last_s - self._record.start_time
        self._record.success = True

    def _event(self, event: bytes) -> None:
        if _CHOICE in event:
            self._token()
            return
        name, _, content = event.strip().partition(b":")
        if name != b"data" or (content := content.strip()) == b"[DONE]":
            return  # a comment, or the end
        try:
            data: Any = json.loads(content)
            choices = data.get("choices")
        except (ValueError, AttributeError):
            raise CompletionError(f"an event that can't be read: {content[:100]!r}") from None
        if choices:  # with other spaces
            self._token()
        elif usage := data.get("usage"):
            self._record.output_tokens = usage.get("completion_tokens") or 0
            self._record.prompt_len = usage.get("prompt_tokens") or self._record.prompt_len
        elif error := data.get("error"):
            self._error = str(error)[:300]

    def _token(self) -> None:
        if self._tokens:
            self._record.itl.append(self._now_s - self._last_s)
        else:
            self._record.ttft = self._now_s - self._record.start_time
        self._last_s = self._now_s
        self._tokens += 1


class _Connection(asyncio.Protocol):
    """A connection, which has one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: _Answer | None = None
        self._done: asyncio.Future[None] | None = None

    @property
    def open(self) -> bool:
        """Whether it can take a request."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, answer: _Answer) -> None:
        """Sends ``request`` and waits until ``answer`` is complete. Raises OSError, CompletionError.

        Closes the connection unless the server keeps it, also when cancelled: the engine then ends the request.
        """
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._answer = answer
        keep = False
        try:
            self._transport.write(request)
            await self._done
            keep = answer.keeps_connection
        finally:
            self._answer = self._done = None
            if not keep:
                self.close()

    def close(self) -> None:
        """Closes it at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self._answer is None:  # nothing was asked
            self.close()
            return
        try:
            self._answer.feed(data)
        except CompletionError as error:
            self._end(error)
        except httptools.HttpParserError as error:
            self._end(CompletionError(f"an answer that can't be read: {error}"))
        else:
            if self._answer.complete:
                self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._transport = None
        self._end(exc if isinstance(exc, OSError) else ConnectionResetError("the server closed the connection"))

    def _end(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


class CompletionClient:
    """Sends completions within one event loop. ``new_record`` makes a record, as vLLM's RequestFuncOutput."""

    def __init__(self, new_record: Callable[[], Any]) -> None:
        self._new_record = new_record
        self._idle: list[_Connection] = []

    def record(self, request: Any) -> Any:
        """A record for ``request``, vLLM's RequestFuncInput, which is sent now."""
        record = self._new_record()
        record.prompt_len = request.prompt_len
        record.start_time = time.perf_counter()
        return record

    async def send(self, request: Any, record: Any) -> None:
        """Sends ``request`` and fills ``record`` as tokens arrive; a failure is in the record."""
        try:
            await self._answered(request, record)
        except (OSError, CompletionError) as error:
            record.success = False
            record.error = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)

    def close(self) -> None:
        """Closes the connections that are kept."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _answered(self, request: Any, record: Any) -> None:
        url = urlsplit(str(request.api_url))
        content = _http_request(url.netloc, url.path, _payload(request), _headers(request))
        while True:
            answer = _Answer(record)
            connection, kept = await self._connection(url.hostname or "", url.port or 80)
            try:
                await connection.exchange(content, answer)
            except OSError:
                if kept and not answer.begun:
                    continue  # the server had closed it meanwhile, so it never took the request
                raise
            if connection.open:
                self._idle.append(connection)
            answer.finish()
            return

    async def _connection(self, host: str, port: int) -> tuple[_Connection, bool]:
        """A connection, and whether it has been used before."""
        while self._idle:
            if (kept := self._idle.pop()).open:
                return kept, True
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, host, port)
        return connection, False


def _payload(request: Any) -> dict[str, Any]:
    """What vLLM's benchmark asks for."""
    payload: dict[str, Any] = {
        "model": request.model_name or request.model,
        "prompt": request.prompt,
        "repetition_penalty": 1.0,
        "max_tokens": request.output_len,
        "logprobs": request.logprobs,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.ignore_eos:
        payload["ignore_eos"] = True
    return {**payload, **(request.extra_body or {})}


def _headers(request: Any) -> dict[str, str]:
    headers: dict[str, str] = {"Content-Type": "application/json", **(request.extra_headers or {})}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    if request.request_id:
        headers["x-request-id"] = request.request_id
    return headers


def _http_request(host: str, path: str, payload: Mapping[str, Any], headers: Mapping[str, str]) -> bytes:
    body = json.dumps(payload).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
