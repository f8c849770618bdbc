"""The client that sends a load's completions, against a server that answers byte by byte as the test says."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("httptools")
pytest.importorskip("uvloop")

from paced_load import Record, Request

from vllm_sloguard.starts.completion_client import CompletionClient

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
Answer = Callable[["Server", asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """Answers every request with ``answer``, and records connections, requests and connections that were closed."""

    answer: Answer
    requests: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list[Any])
    connections: int = 0
    closed: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")[1:-2]
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
                body = await reader.readexactly(int(headers["content-length"]))
                self.requests.append((headers, json.loads(body)))
                await self.answer(self, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.closed += 1
        finally:
            writer.close()


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def event(content: dict[str, Any], separators: tuple[str, str] = (",", ":")) -> bytes:
    return b"data: " + json.dumps(content, separators=separators).encode() + b"\n\n"


def token(text: str = " a", **spaces: Any) -> bytes:
    return event({"id": "cmpl-1", "choices": [{"index": 0, "text": text}], "usage": None}, **spaces)


USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}})


def whole(*events: bytes) -> bytes:
    return HEAD + b"".join(map(chunk, events)) + b"0\r\n\r\n"


def written(content: bytes, size: int = 0) -> Answer:
    """An answer of ``content`` at once, or ``size`` bytes at a time."""

    async def answer(_server: Server, writer: asyncio.StreamWriter) -> None:
        for at in range(0, len(content), size or len(content)):
            writer.write(content[at : at + (size or len(content))])
            await asyncio.sleep(0)

    return answer


def send(answer: Answer, count: int = 1, *, at_once: bool = False, **request: Any) -> tuple[list[Record], Server]:
    """Sends requests one after the other, or ``at_once``; each may take a second."""
    server = Server(answer)

    async def run() -> list[Record]:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        client = CompletionClient(Record)

        async def one() -> Record:
            asked = Request(f"http://127.0.0.1:{port}/v1/completions", **request)
            record: Record = client.record(asked)
            try:
                async with asyncio.timeout(1.0):
                    await client.send(asked, record)
            except TimeoutError:
                record.error = "timed out"
            return record

        records = (
            await asyncio.gather(*(one() for _ in range(count))) if at_once else [await one() for _ in range(count)]
        )
        client.close()
        listening.close()
        while server.closed < server.connections:
            await asyncio.sleep(0.01)
        return records

    return asyncio.run(run()), server


ALL = whole(token(), token("b"), token(""), token("d"), USAGE, DONE)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 100])
def test_an_answer_is_read_however_it_is_cut(size: int) -> None:
    [record], server = send(written(ALL, size))

    assert (record.success, record.error) == (True, "")
    assert (len(record.itl), record.output_tokens, record.prompt_len) == (3, 4, 7)
    assert 0 < record.ttft <= record.latency
    assert record.latency == pytest.approx(record.ttft + sum(record.itl))
    [(headers, body)] = server.requests
    assert headers["content-type"] == "application/json"
    assert body == {
        "model": "model",
        "prompt": "a prompt",
        "repetition_penalty": 1.0,
        "max_tokens": 4,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


@pytest.mark.parametrize(
    "events",
    [
        (token('"choices":[{'), token(), USAGE, DONE),
        (token(separators=(", ", ": ")), token(separators=(", ", ": ")), USAGE, DONE),
        (b": ping\n\n", token(), b": ping\n\n", token("\n\n"), USAGE, DONE),
        (token() + token(), USAGE + DONE),
        (token(), token(), USAGE.rstrip()),
    ],
    ids=["quotes in a text", "spaces", "comments", "several in one chunk", "no newline at the end"],
)
def test_tokens_are_counted_whatever_they_look_like(events: Sequence[bytes]) -> None:
    [record], _ = send(written(whole(*events)))

    assert (record.success, len(record.itl), record.output_tokens) == (True, 1, 4)


def test_tokens_are_timed_as_they_arrive() -> None:
    async def slowly(_server: Server, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for _ in range(10):
            await asyncio.sleep(0.02)
            writer.write(chunk(token()))
        writer.write(chunk(USAGE) + chunk(DONE) + b"0\r\n\r\n")

    began = time.perf_counter()
    [record], _ = send(slowly)

    # The server's sleeps are never shorter than asked for; on a busy machine they are longer.
    assert record.ttft >= 0.02
    assert min(record.itl) >= 0.01
    assert 0.2 <= record.latency <= time.perf_counter() - began


def test_a_connection_is_used_again_and_at_once_there_are_several() -> None:
    records, server = send(written(ALL), 5)
    assert ([r.success for r in records], server.connections) == ([True] * 5, 1)

    records, server = send(written(ALL), 5, at_once=True)
    assert ([r.success for r in records], server.connections) == ([True] * 5, 5)


def test_a_kept_connection_that_the_server_has_closed_is_replaced() -> None:
    async def close_after_two(server: Server, writer: asyncio.StreamWriter) -> None:
        if len(server.requests) == 2:
            raise ConnectionResetError  # without a byte
        writer.write(ALL)

    records, server = send(close_after_two, 3)

    assert [r.error for r in records] == ["", "", ""]
    assert (server.connections, len(server.requests)) == (2, 4)


def test_a_new_connection_that_is_closed_is_a_failure() -> None:
    async def close(_server: Server, _writer: asyncio.StreamWriter) -> None:
        raise ConnectionResetError

    [record], server = send(close)

    assert not record.success
    assert record.error == "ConnectionResetError: the server closed the connection"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'HTTP/1.1 400 Bad Request\r\ncontent-length: 13\r\n\r\n{"no":\n "no"}', 'HTTP 400: {"no": "no"}'),
        (b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n", "HTTP 500: "),
        (whole(USAGE, DONE), "an answer without a token"),
        (whole(token(), event({"error": {"message": "engine died"}})), "{'message': 'engine died'}"),
        (whole(b"data: {\n\n"), "an event that can't be read: b'{'"),
        (whole(b"data: 3\n\n"), "an event that can't be read: b'3'"),
        (b"220 smtp.example.org\r\n", "an answer that can't be read: Expected HTTP"),
    ],
)
def test_an_answer_that_is_no_completion_is_a_failure(content: bytes, error: str) -> None:
    [record], _ = send(written(content))

    assert not record.success
    assert record.error.startswith(error)


def test_an_answer_that_is_cut_off_is_a_failure() -> None:
    async def cut(_server: Server, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(token()))
        await writer.drain()
        raise ConnectionResetError

    [record], _ = send(cut)

    assert (record.success, record.error) == (False, "ConnectionResetError: the server closed the connection")


def test_a_request_that_is_given_up_closes_its_connection() -> None:
    async def never(_server: Server, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(token()))

    records, server = send(never, 2)

    assert [r.error for r in records] == ["timed out", "timed out"]
    assert (server.connections, server.closed) == (2, 2)
    assert records[0].ttft > 0


def test_a_server_that_is_gone_is_a_failure() -> None:
    async def run() -> Record:
        listening = await asyncio.start_server(Server(written(ALL)).serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        listening.close()
        await listening.wait_closed()
        client, asked = CompletionClient(Record), Request(f"http://127.0.0.1:{port}/v1/completions")
        record: Record = client.record(asked)
        await client.send(asked, record)
        return record

    assert asyncio.run(run()).error.startswith("ConnectionRefusedError: ")


def test_what_is_asked_for_beside_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    _, server = send(
        written(ALL),
        model_name="served",
        extra_body={"top_k": 3},
        extra_headers={"x-one": "1"},
        request_id="r-1",
        ignore_eos=False,
    )

    [(headers, body)] = server.requests
    assert (headers["authorization"], headers["x-one"], headers["x-request-id"]) == ("Bearer sk-test", "1", "r-1")
    assert (body["model"], body["top_k"], "ignore_eos" in body) == ("served", 3, False)
