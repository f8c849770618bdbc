"""Client of vllm_sloguard.starts.fork_server, which forks engines from a process that has already imported vLLM.

The server runs in vLLM's environment and is reached over a private socket pair. Any failure is a ForkServerError, and
the caller falls back to an ordinary start; a server that has died or grown too large is replaced.
"""

import queue
import socket
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vllm_sloguard.agent.private_files import umask_of_children
from vllm_sloguard.agent.serve_command import Args, entry
from vllm_sloguard.starts.fork_protocol import (
    Answer,
    Detached,
    DetachRequest,
    Exited,
    ForkedEngine,
    ForkProtocolError,
    ForkRequest,
    Request,
    ServerReady,
    ServerUsage,
    Unusable,
    decode_answer,
    encode_message,
)

AnswerT = TypeVar("AnswerT", ServerReady, ForkedEngine, Detached)

_IMPORT_TIMEOUT_S = 180.0
_FORK_TIMEOUT_S = 60.0  # the first fork after a new kind of engine also imports that engine's modules
_MAX_GROWTH_BYTES = 2**29
_MAX_NEW_DESCRIPTORS = 8


# Arguments that make vLLM spawn new processes: slower from a forked parent, or not equivalent to an ordinary start.
_NOT_FORKED = {
    "numa_bind": (True,),
    "distributed_executor_backend": ("ray", "external_launcher"),
    "data_parallel_backend": ("ray",),
}


def unforkable(args: Args) -> str:
    """Why an engine with ``args`` must not be forked; empty if it may be."""
    return next((f"{name} {args[name]}" for name, values in _NOT_FORKED.items() if args.get(name) in values), "")


class ForkServerError(RuntimeError):
    """No engine can be forked."""


class Forked:
    """The first process of a forked engine, with the part of ``subprocess.Popen``'s interface that is needed."""

    def __init__(self, pid: int, codes: dict[int, int], ended: threading.Condition) -> None:
        self.pid = pid
        self._codes = codes
        self._ended = ended

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while running, or if the server that knew it is gone."""
        return self._codes.get(self.pid)

    def wait(self, timeout: float) -> int:
        """Waits for the exit code. Raises subprocess.TimeoutExpired."""
        with self._ended:
            if not self._ended.wait_for(lambda: self.pid in self._codes, timeout):
                raise subprocess.TimeoutExpired("a forked engine", timeout)
        return self._codes[self.pid]


@dataclass
class _Running:
    """One server process; ``answers`` ends with None."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    answers: "queue.Queue[Answer | None]"
    usage: ServerUsage | None = None  # at readiness, the baseline for growth
    worn: bool = False


class ForkServer:
    """Starts its process with the first engine, or earlier by ``warm_up``.

    ``folder`` keeps what engines were seen to import, ``environment`` is that of the engines: libraries read some of it
    when they are imported. ``usage`` is what the server used at the last fork.
    """

    def __init__(self, python: str, environment: Mapping[str, str], folder: Path, log: Path) -> None:
        self._python = python
        self._environment = environment
        self._folder = folder
        self._log = log
        self._running: _Running | None = None
        self._codes: dict[int, int] = {}
        self.usage: ServerUsage | None = None
        self._ended = threading.Condition()

    def warm_up(self) -> None:
        """Starts the server if it is not running, without waiting for its imports. Raises ForkServerError.

        A server that has grown too large is replaced; the engines it forked must have ended.
        """
        if self._running is not None and not self._running.worn and self._running.process.poll() is None:
            return
        self.close()
        options = entry(self._python).options
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._log.open("ab") as log:
                process = subprocess.Popen(
                    [self._python, *options, "-m", "vllm_sloguard.starts.fork_server", str(self._folder)],
                    stdin=theirs.fileno(),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=dict(self._environment),
                    umask=umask_of_children(),
                )
        except OSError as error:
            ours.close()
            raise ForkServerError(f"the fork server did not start: {error}") from None
        self._running = _Running(process, ours, queue.Queue())
        threading.Thread(target=self._listen, args=(self._running,), daemon=True).start()

    def ready(self) -> None:
        """Waits until engines can be forked. Raises ForkServerError."""
        self.warm_up()
        assert self._running is not None
        _await_ready(self._running)

    def fork(self, module: str, argv: list[str], env: Mapping[str, str], log: Path, folder: Path) -> Forked:
        """Forks an engine that runs ``python -m module argv``, appending output to ``log``. Raises ForkServerError."""
        self.warm_up()
        assert self._running is not None
        running = self._running
        request = ForkRequest(module, tuple(argv), dict(env), str(log), str(folder))
        try:
            before = _await_ready(running)
            answer = _ask(running, request, ForkedEngine)
        except (ForkServerError, OSError) as error:
            self.close()
            raise ForkServerError(f"{error}; see {self._log}") from None
        forked = Forked(answer.pid, self._codes, self._ended)
        self.usage = answer.usage
        running.worn = _has_grown(before, answer.usage)
        return forked

    def detach(self, pid: int) -> None:
        """Lets the engine of ``pid`` outlive the server. Raises ForkServerError."""
        if self._running is None:
            raise ForkServerError("the fork server has ended")
        try:
            _ask(self._running, DetachRequest(pid), Detached)
        except (ForkServerError, OSError) as error:
            self.close()
            raise ForkServerError(f"{error}; see {self._log}") from None

    def close(self) -> None:
        """Ends the server and every running engine that it forked, except detached ones."""
        if self._running is None:
            return
        with suppress(OSError):
            self._running.channel.shutdown(socket.SHUT_RDWR)
        try:
            self._running.process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._running.process.kill()
            self._running.process.wait()
        self._running.channel.close()
        self._running = None

    def pids(self) -> set[int]:
        """The server's process, if one was started."""
        return set() if self._running is None else {self._running.process.pid}

    def _listen(self, running: _Running) -> None:
        with running.channel.makefile("rb") as lines, suppress(OSError, ForkProtocolError):
            for line in lines:
                answer = decode_answer(line)
                if isinstance(answer, Exited):
                    with self._ended:
                        self._codes[answer.pid] = answer.code
                        self._ended.notify_all()
                else:
                    running.answers.put(answer)
        running.answers.put(None)


def _await_ready(running: _Running) -> ServerUsage:
    """Waits for its imports; returns its resource usage at that point. Raises ForkServerError."""
    if running.usage is None:
        running.usage = _expect(running, ServerReady, _IMPORT_TIMEOUT_S).usage
    return running.usage


def _ask(running: _Running, request: Request, kind: type[AnswerT]) -> AnswerT:
    """Sends ``request`` and waits for its answer. Raises ForkServerError, OSError."""
    running.channel.sendall(encode_message(request))
    return _expect(running, kind, _FORK_TIMEOUT_S)


def _expect(running: _Running, kind: type[AnswerT], timeout_s: float) -> AnswerT:
    """The next answer, which must be a ``kind``. Raises ForkServerError."""
    try:
        answer = running.answers.get(timeout=timeout_s)
    except queue.Empty:
        raise ForkServerError(f"the fork server did not answer within {timeout_s:.0f} s") from None
    if answer is None:
        raise ForkServerError("the fork server has ended")
    if not isinstance(answer, kind):
        reason = answer.reason if isinstance(answer, Unusable) else f"unexpected {type(answer).__name__}"
        raise ForkServerError(f"the fork server is unusable: {reason}")
    return answer


def _has_grown(before: ServerUsage, now: ServerUsage) -> bool:
    return (
        now.threads > before.threads
        or now.descriptors > before.descriptors + _MAX_NEW_DESCRIPTORS
        or now.resident_bytes > before.resident_bytes + _MAX_GROWTH_BYTES
    )
