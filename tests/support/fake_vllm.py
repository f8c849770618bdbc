#!/usr/bin/env python3
"""Stands in for the Python of vLLM's environment, for faults and speed: real processes, started as vLLM is.

``engine.python`` names this file. Started as the API server it answers vLLM's HTTP, with a core of its own process
through which every token goes, and speaks the plugin's telemetry over the plugin's own link where FAKE_TELEMETRY is
set, of requests and the KV cache too where that is "whole"; with FAKE_TRAFFIC the serving engine reports that many
requests a second. Started as the load client it answers the client's protocol, with latencies that follow from the
engine's max_num_seqs, a hundredfold above FAKE_CAPACITY_RPS. Numbers of sequences that mean more: 13 runs out of memory
at its start, 17 hangs once it is up, 19 dies under its first load with code 0.

FAKE_FOLDER names a folder from which faults are taken, each file in it being one: ``ROLE.start.oom.*``,
``ROLE.start.fail.*`` and ``ROLE.start.hang.*`` fail one start each, ``ROLE.load.oom.*`` and ``ROLE.load.die.*`` one
load, where the role is ``serving`` for an engine on FAKE_SERVING_PORT and ``trial`` for another; while ``flood`` is
there, the serving engine writes 16 MiB of log a second; ``ignore_sigterm`` and
``cut_answers`` hold as long as they are there. ``device`` there is the card: a core holds a lock on it for as long as
it lives, and ``starts.jsonl`` tells of each start and whether the card was free.
"""

import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

OUT_OF_MEMORY, HANGS, DIES = 13, 17, 19
OOM_TEXT = (
    "(EngineCore pid=1) ERROR 11-22 05:14:16 [core.py:1510] torch.OutOfMemoryError: CUDA out of memory. "
    "Tried to allocate 2.00 GiB.\nRuntimeError: Engine core initialization failed. See root cause above."
)
# The end of tests/vllm_sloguard/crash/logs/batched_tokens_below_seqs.log.
FAIL_TEXT = (
    "(APIServer pid=1) pydantic_core._pydantic_core.ValidationError: 1 validation error for SchedulerConfig\n"
    "  Value error, max_num_batched_tokens (8) must be greater than or equal to max_num_seqs (16)."
)
DEATH_TEXT = "(APIServer pid=1) ERROR 11-22 05:14:16 [async_llm.py:707] EngineDeadError: EngineCore has failed."
# Bounds the life of a core whose server and sidecar are both gone.
_LONGEST_LIFE_S = float(os.environ.get("FAKE_LONGEST_LIFE_S", "300"))


class Script:
    """The faults to inject, and the record of starts."""

    def __init__(self, folder: str, role: str) -> None:
        self._folder = Path(folder) if folder else None
        self._role = role

    def take(self, fault: str) -> bool:
        """Whether ``fault`` is due; each of its files injects it once."""
        if self._folder is None:
            return False
        for token in sorted(self._folder.glob(f"{self._role}.{fault}.*")):
            with suppress(FileNotFoundError):
                token.unlink()
                return True
        return False

    @property
    def takes_faults(self) -> bool:
        """Whether there is a folder of faults."""
        return self._folder is not None

    def holds(self, fault: str) -> bool:
        """Whether ``fault`` is active."""
        return self._folder is not None and (self._folder / fault).exists()

    def started(self, max_num_seqs: int, parent: int) -> None:
        """Locks the GPU for the life of this process, and records the start."""
        if self._folder is None:
            return
        # Nobody is left to end it when a whole campaign is killed.
        threading.Timer(_LONGEST_LIFE_S, os._exit, (1,)).start()
        card = os.open(self._folder / "device", os.O_CREAT | os.O_RDWR)
        free = True
        try:
            fcntl.flock(card, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        told = {"sidecar": parent, "role": self._role, "seqs": max_num_seqs, "at": time.monotonic(), "free": free}
        with suppress(OSError), (self._folder / "starts.jsonl").open("a") as starts:
            starts.write("\n" + json.dumps(told) + "\n")


class Core:
    """The engine core: a separate process that generates tokens and outlives a killed server."""

    def __init__(self, script: Script, max_num_seqs: int) -> None:
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        sidecar = _controller()
        self.pid = os.fork()
        if self.pid == 0:
            self._socket.close()
            script.started(max_num_seqs, sidecar)
            _make_tokens(theirs)
        theirs.close()
        self.step()  # it is up once it has answered

    def step(self) -> bool:
        """Runs one step; False where the core is dead."""
        with self._lock, suppress(OSError):
            self._socket.sendall(b"?")
            return self._socket.recv(1) == b"!"
        return False

    def end(self) -> None:
        """Ends the core, as vLLM's server does when it shuts down."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _controller() -> int:
    """Who has it started: the epoch that holds the lease of its agent, or the sidecar's process without an agent."""
    folder = Path(os.environ.get("SLOGUARD_SOCKET", "")).parent
    with suppress(OSError, ValueError, KeyError):
        return int(json.loads((folder / "agent.json").read_text())["epoch"])
    return os.getppid()


def _make_tokens(server: socket.socket) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):
        while server.recv(1):
            server.sendall(b"!")
    time.sleep(_LONGEST_LIFE_S)
    os._exit(1)


class Engine(BaseHTTPRequestHandler):
    """The part of vLLM's HTTP API that the sidecar uses."""

    max_num_seqs = 0
    model = "fake"
    script: Script
    core: Core
    telemetry: Any = None
    in_flight = 0
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Health, the model name, and the load client's requests."""
        if self.path == "/metrics":
            counts = f'vllm:num_requests_running{{engine="0"}} {Engine.in_flight}.0\n'
            self._send(self.telemetry.metrics.page() if self.telemetry is not None else counts.encode())
        elif self.path == "/load":
            self._answer({"max_num_seqs": self.max_num_seqs})
        elif self.path == "/v1/models":
            self._answer({"data": [{"id": self.model}]})
        else:
            self._answer({})

    def do_POST(self) -> None:
        """A completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("load"):
            self._under_load()
        if self.max_num_seqs == HANGS:
            time.sleep(600)
        Engine.in_flight += 1
        began = time.monotonic()
        try:
            time.sleep(body.get("seconds", 0))
            if self.core.step():
                self._tell_of(body, time.monotonic() - began)
                self._answer({"choices": [{"text": "b" * body["max_tokens"], "finish_reason": "length"}]})
            else:
                self.send_error(500, "EngineDeadError")
        finally:
            Engine.in_flight -= 1

    def _under_load(self) -> None:
        if self.max_num_seqs == DIES or self.script.take("load.die"):
            os._exit(0)
        if self.script.take("load.oom"):
            say(OOM_TEXT.splitlines()[0])
            self.core.end()

    def _tell_of(self, body: dict[str, Any], took_s: float) -> None:
        if self.telemetry is not None:
            self.telemetry.stepped(min(self.in_flight, self.max_num_seqs), max(self.in_flight - self.max_num_seqs, 0))
            # "a", the sidecar's probe, is two tokens.
            self.telemetry.finished(took_s, len(body.get("prompt", "")) + 1, body["max_tokens"])

    def _answer(self, content: dict[str, Any]) -> None:
        self._send(json.dumps(content).encode())

    def _send(self, text: bytes) -> None:
        if self.script.holds("cut_answers"):
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + text)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


class Server(ThreadingHTTPServer):
    """Logs nothing about clients that disconnected."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing."""


def say(text: str) -> None:
    """Writes a log line; never fails, not even on a full disk."""
    with suppress(OSError):
        os.write(1, text.encode() + b"\n")


def serve(argv: list[str]) -> int:
    """The API server."""
    flags = dict(pairwise(argv))
    Engine.max_num_seqs = int(flags["--max-num-seqs"])
    Engine.model = flags.get("--served-model-name", flags.get("--model", "fake"))
    role = "serving" if flags["--port"] == os.environ.get("FAKE_SERVING_PORT") else "trial"
    Engine.script = Script(os.environ.get("FAKE_FOLDER", ""), role)
    Engine.core = Core(Engine.script, Engine.max_num_seqs)
    time.sleep(float(os.environ.get("FAKE_START_S", "0")))
    if (text := _failure()) is not None:
        say(text)
        Engine.core.end()
        return 1
    if Engine.script.take("start.hang"):
        time.sleep(_LONGEST_LIFE_S)
    server = Server((flags["--host"], int(flags["--port"])), Engine)
    timeout_s = float(flags.get("--shutdown-timeout", 0))
    signal.signal(signal.SIGTERM, lambda _number, _frame: _stop(server, timeout_s))
    threading.Thread(target=_end_with_core, daemon=True).start()
    if role == "serving" and Engine.script.takes_faults:
        threading.Thread(target=_flood_log, daemon=True).start()
    if os.environ.get("FAKE_TELEMETRY"):
        threading.Thread(target=_tell, args=(flags.get("--model", "fake"), role), daemon=True).start()
    say(f"serving with {Engine.max_num_seqs}")
    server.serve_forever(poll_interval=0.05)
    return 0


def _failure() -> str | None:
    if Engine.max_num_seqs == OUT_OF_MEMORY or Engine.script.take("start.oom"):
        return OOM_TEXT
    return FAIL_TEXT if Engine.script.take("start.fail") else None


def _stop(server: Server, timeout_s: float) -> None:
    """Drains: accepts no new requests, finishes those in flight, and exits."""

    def end() -> None:
        server.socket.close()
        deadline = time.monotonic() + timeout_s
        while Engine.in_flight and time.monotonic() < deadline:
            time.sleep(0.01)
        Engine.core.end()
        os._exit(0)

    if not Engine.script.holds("ignore_sigterm"):
        threading.Thread(target=end).start()


def _flood_log() -> None:
    while True:
        time.sleep(0.25)
        if Engine.script.holds("flood"):
            say(f"{'x' * 1023}\n" * (4 << 10))


def _end_with_core() -> None:
    """What vLLM does when its core has died: logs it and exits with code 0."""
    os.waitpid(Engine.core.pid, 0)
    say(DEATH_TEXT)
    time.sleep(0.1)
    os._exit(0)


def _tell(model: str, role: str) -> None:
    """Sets Engine.telemetry once the link is up: its imports must not slow the start."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from fake_telemetry import Telemetry

    Engine.telemetry = Telemetry(model, whole=os.environ["FAKE_TELEMETRY"] == "whole")
    if (rate := float(os.environ.get("FAKE_TRAFFIC", "0"))) and role == "serving":
        _make_traffic(rate)


def _make_traffic(rate: float) -> None:
    """Reports finished requests, as of users, at a steady rate."""
    sent, began = 0, time.monotonic()
    while True:
        time.sleep(0.1)
        due = int((time.monotonic() - began) * rate)
        Engine.telemetry.stepped(1, 0)
        for number in range(sent, due):
            Engine.telemetry.finished(0.2 + 0.1 * (number % 10) / 10, 128, 32)
        sent = due


def send_loads() -> int:
    """The load client: more sequences are faster; the spread over requests is constant."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from vllm_sloguard.starts.load_protocol import (
        LoadReport,
        Ready,
        RequestResult,
        RunLoad,
        command_from_json,
        message_line,
    )

    print(message_line(Ready()), flush=True)
    for line in sys.stdin:
        order = command_from_json(line)
        if not isinstance(order, RunLoad):
            continue
        flags = dict(pairwise(order.argv))
        count, rate = int(flags["--num-prompts"]), float(flags["--request-rate"])
        url = flags["--base-url"]
        error = ""
        try:
            with urllib.request.urlopen(f"{url}/load", timeout=5) as response:
                mean_s = 0.4 / json.loads(response.read())["max_num_seqs"]
            _complete(url)
            time.sleep(float(os.environ.get("FAKE_LOAD_S", "0.1")))
            _complete(url)
        except (OSError, ValueError, HTTPException) as failed:
            mean_s, error = 0.1, str(failed)
        if rate > float(os.environ.get("FAKE_CAPACITY_RPS", "inf")):
            mean_s *= 100
        requests: list[RequestResult] = []
        for number in range(count):
            ttft_s, at = mean_s * (0.9 + 0.2 * number / count), number / rate
            # Failed requests have nothing but their error and the time at which they were sent.
            result = RequestResult(None, None, (), error, at, at) if error else None
            requests.append(result or RequestResult(ttft_s, ttft_s * 2, (0.01,), "", at, at))
        print(message_line(LoadReport(tuple(requests), 1.0, count)), flush=True)
    return 0


def _complete(url: str) -> None:
    body = json.dumps({"max_tokens": 1, "load": True}).encode()
    with urllib.request.urlopen(f"{url}/v1/completions", data=body, timeout=5) as response:
        response.read()


def main() -> int:
    """Runs as the vLLM program that it was started as."""
    argv = sys.argv[1:]
    if "-c" in argv:
        return 1  # no distribution is named vllm, as with the CPU build
    if argv[:2] == ["-m", "vllm_sloguard.starts.load_generator"]:
        return send_loads()
    if "vllm_sloguard.starts.fork_server" in argv:
        os.write(0, json.dumps({"unusable": "there is no vLLM to import"}).encode() + b"\n")
        return 0
    threading.stack_size(256 * 1024)
    return serve(argv)


if __name__ == "__main__":
    sys.exit(main())
