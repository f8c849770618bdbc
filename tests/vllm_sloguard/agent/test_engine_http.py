"""The client for vLLM's HTTP server, against a real server that misbehaves."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from own_ports import own_port

from vllm_sloguard.agent.engine_http import EngineHttp, Unanswered, address

MODELS = {"data": [{"id": "demo"}]}


class Server(ThreadingHTTPServer):
    """Serves ``answers`` by path: a status and a body, or no status for no answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int | None, bytes]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.closing = threading.Event()

    def says(self, path: str, answer: object, status: int | None = 200) -> None:
        self.answers[path] = status, answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    def completes(self, text: str, finish_reason: str) -> None:
        self.says("/v1/completions", {"choices": [{"text": text, "finish_reason": finish_reason}]})


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("Authorization"))
        status, body = self.server.answers.get(self.path, (404, b""))
        if status is None:
            self.server.closing.wait()
            return
        if status == 0:  # not HTTP at all
            self.wfile.write(body)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + (100 if body.startswith(b"cut") else 0)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.says("/v1/models", MODELS)
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def client(server: Server, **environment: str) -> EngineHttp:
    return EngineHttp("127.0.0.1", server.server_address[1], environment)


def test_healthy(server: Server) -> None:
    server.says("/health", b"")

    assert client(server).healthy(timeout_s=60)


@pytest.mark.parametrize("status", [404, 500, 503])
def test_an_error_is_not_healthy(server: Server, status: int) -> None:
    server.says("/health", b"", status)

    assert not client(server).healthy()


def test_nobody_there_is_not_healthy() -> None:
    assert not EngineHttp("127.0.0.1", own_port(), {}).healthy()


def test_silence_is_not_healthy_and_ends(server: Server) -> None:
    server.says("/health", b"", None)
    began = time.monotonic()

    assert not client(server).healthy(timeout_s=0.2)
    assert time.monotonic() - began < 30


def test_a_completion_asks_for_the_served_model(server: Server) -> None:
    server.completes(" world", "length")

    assert client(server).complete("hello", 3, 60.0) == " world"
    assert [(b["model"], b["prompt"], b["max_tokens"]) for b in server.bodies] == [("demo", "hello", 3)]


def test_key_goes_with_the_request_only_where_there_is_one(server: Server) -> None:
    client(server).model()
    client(server, VLLM_API_KEY="secret").model()

    assert server.keys == [None, "Bearer secret"]


@pytest.mark.parametrize("reason", ["abort", "error", None])
def test_an_aborted_completion_is_no_answer(server: Server, reason: Any) -> None:
    server.completes("", reason)

    with pytest.raises(Unanswered, match=repr(reason)):
        client(server).complete("hello", 1, 60.0)


def test_a_completion_that_hangs_is_no_answer(server: Server) -> None:
    server.says("/v1/completions", b"", None)
    began = time.monotonic()

    with pytest.raises(Unanswered, match="timed out"):
        client(server).complete("hello", 1, 0.2)
    assert time.monotonic() - began < 30


def test_an_error_is_no_answer(server: Server) -> None:
    server.says("/v1/completions", b"boom", 500)

    with pytest.raises(Unanswered, match="/v1/completions: status 500"):
        client(server).complete("hello", 1, 60.0)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>"),
        (200, b"\xff"),
        (200, b"{}"),
        (200, b"[]"),
        (200, b"null"),
        (200, b'{"data": []}'),
        (200, b'{"data": [{}]}'),
        (200, b"cut short"),
        (0, b"SSH-2.0-OpenSSH\r\n"),
        (0, b""),
    ],
)
def test_another_server_s_answer_is_no_answer(server: Server, status: int, body: bytes) -> None:
    server.says("/v1/models", body, status)

    with pytest.raises(Unanswered):
        client(server).model()


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b'{"choices": []}', b'{"choices": ["a"]}'])
def test_a_completion_without_a_choice_is_no_answer(server: Server, body: bytes) -> None:
    server.says("/v1/completions", body)

    with pytest.raises(Unanswered):
        client(server).complete("hello", 1, 60.0)


def test_a_proxy_of_the_environment_is_not_asked(server: Server) -> None:
    server.says("/health", b"")
    # In a separate process, since urllib reads the environment only once.
    code = (
        "import sys; from vllm_sloguard.agent.engine_http import EngineHttp as E\n"
        "print(E('127.0.0.1', int(sys.argv[1])).healthy(timeout_s=60))"
    )
    port, nobody = str(server.server_address[1]), f"http://127.0.0.1:{own_port()}"

    ended = subprocess.run(
        [sys.executable, "-c", code, port], env={"http_proxy": nobody}, capture_output=True, check=True, timeout=300
    )

    assert ended.stdout == b"True\n"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),  # noqa: S104
        ("::1", "http://[::1]:8000"),
    ],
)
def test_url_of_a_host(host: str, url: str) -> None:
    assert EngineHttp(host, 8000, {}).base_url == url


def test_an_address_of_ipv6_stands_in_brackets() -> None:
    assert address("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert address("::1", 8000) == "http://[::1]:8000"
