"""One start of vLLM, from its command line to its end."""

import os
import random
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from sidecar.engine.command import Args, arguments, command_line, entry
from sidecar.engine.fork_server import ForkServer
from sidecar.engine.http import EngineHttp, Unanswered
from sidecar.engine.process_group import ENGINE_ID_VARIABLE, Identity, ProcessGroup, socket_folder
from vllm_sloguard.crash import Crash, classify

_POLL_S = 0.1
_FIRST_TOKEN_S = 30.0
_STOP_GRACE_S = 10.0
_OWN_PORTS = 8_000
_LOG_TAIL_BYTES = 2**20
_LOG_MOST_BYTES = 2**26


class Cancelled(RuntimeError):  # noqa: N818 - it names what happened
    """The wait was given up because somebody asked for that."""


class EngineCrashed(RuntimeError):  # noqa: N818 - the field's word
    """The engine ended, or was ended for not answering, without being asked to stop."""

    def __init__(self, crash: Crash) -> None:
        super().__init__(f"{crash.category}: {crash.evidence}")
        self.crash = crash


@dataclass(frozen=True)
class Launch:
    """What one start needs. ``engine_id`` is unique; ``env`` is added to the sidecar's own environment."""

    engine_id: str
    python: str
    model: str
    args: Args
    host: str
    port: int
    env: Mapping[str, str]
    log: Path
    drain_timeout_s: int = 0

    @property
    def all_args(self) -> Args:
        """Every argument of the command line."""
        return {**self.args, "host": self.host, "port": self.port, "shutdown_timeout": self.drain_timeout_s}

    @property
    def environment(self) -> dict[str, str]:
        """Every variable of its first process."""
        own = {ENGINE_ID_VARIABLE: self.engine_id, "VLLM_RPC_BASE_PATH": str(socket_folder(self.engine_id))}
        return {**os.environ, **self.env, **own}


class Engine:
    """A vLLM server and its processes."""

    def __init__(self, launch: Launch, group: ProcessGroup) -> None:
        self.launch = launch
        self.group = group
        self.http = EngineHttp(launch.host, launch.port, launch.environment)

    @classmethod
    def start(cls, launch: Launch, fork_server: ForkServer | None = None) -> "Engine":
        """Starts vLLM, forked if there is a ``fork_server``, and does not wait for it.

        Raises EngineCrashed when the port is taken, OSError or ForkServerError when it can't.
        """
        if not port_free(launch.host, launch.port):
            taken = classify(
                f"OSError: [Errno 98] Address already in use: {launch.host}:{launch.port}{port_owner(launch.port)}",
                phase="starting",
                exit_code=None,
            )
            raise EngineCrashed(taken)
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        socket_folder(launch.engine_id).mkdir(mode=0o700, exist_ok=True)
        python, model, folder = launch.python, launch.model, launch.log.parent
        if fork_server is None:
            command = command_line(python, model, launch.all_args)
            return cls(launch, ProcessGroup.start(command, launch.engine_id, launch.log, launch.environment, folder))
        argv = arguments(python, model, launch.all_args)
        forked = fork_server.fork(entry(python).module, argv, launch.environment, launch.log, folder)
        return cls(launch, ProcessGroup.of_child(forked, launch.engine_id))

    @classmethod
    def adopt(cls, launch: Launch, identity: Identity) -> "Engine":
        """The engine that an earlier sidecar started."""
        return cls(launch, ProcessGroup(identity))

    def wait_ready(self, timeout_s: float, cancelled: Callable[[], bool]) -> float:
        """Waits for the first token and returns the seconds that it took.

        Raises EngineCrashed, with all its processes gone, or Cancelled, with the engine as it is.
        """
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            if cancelled():
                raise Cancelled
            if not self.group.leader_alive():
                raise self.crashed("starting")
            if waited > timeout_s:
                raise self.crashed("starting", timed_out=True)
            if self.http.healthy():
                try:
                    self.probe(min(_FIRST_TOKEN_S, max(timeout_s - waited, 1.0)))
                except Unanswered:
                    time.sleep(_POLL_S)
                    continue
                return time.monotonic() - began
            time.sleep(_POLL_S)

    def probe(self, timeout_s: float) -> None:
        """Asks for one token: /health can be green while the engine hangs. Raises Unanswered."""
        self.http.complete("a", 1, timeout_s)

    def alive(self) -> bool:
        """Whether its first process runs."""
        return self.group.leader_alive()

    def crashed(self, phase: str, *, timed_out: bool = False) -> EngineCrashed:
        """Kills what is left of it, and says why it ended, from its log; where it hung, stays in the log."""
        exit_code = self.group.exit_code()
        if timed_out:
            said = self.log_tail()
            self.group.show_stacks()
            self.group.kill()
        else:
            self.group.kill()
            said = self.log_tail()
        return EngineCrashed(classify(said, phase=phase, exit_code=exit_code, timed_out=timed_out))

    def log_tail(self) -> str:
        """The end of its log, at most 1 MiB; empty when somebody has removed it."""
        try:
            with self.launch.log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(size - _LOG_TAIL_BYTES, 0))
                return log.read().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def trim_log(self) -> None:
        """Empties a log that has grown large; vLLM appends to it, so it goes on at the start."""
        with suppress(FileNotFoundError):
            if self.launch.log.stat().st_size > _LOG_MOST_BYTES:
                os.truncate(self.launch.log, 0)

    def stop(self) -> float:
        """Lets requests in flight finish within the drain timeout, ends it whole, and returns the seconds taken."""
        began = time.monotonic()
        self.group.stop(self.launch.drain_timeout_s + _STOP_GRACE_S)
        return time.monotonic() - began


def port_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def port_owner(port: int) -> str:
    """Who listens there, as the end of a sentence; empty where the system does not tell."""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr[1] == port and connection.status == psutil.CONN_LISTEN:
                return f", by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def first_given_port() -> int:
    """The lowest port that the system gives to clients, and to who asks for any: Linux's own default where unknown."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return 32_768


def any_free_port(host: str = "127.0.0.1", below: int | None = None) -> int:
    """A port that is free now, ``below`` those that the system gives away: a start takes long to listen there.

    Where the system gives all of them away, or none is free, it is one of the system's. Raises OSError without any.
    """
    end = first_given_port() if below is None else below
    ports = range(max(end - _OWN_PORTS, 1_024), end)
    for port in random.sample(ports, len(ports)):
        if port_free(host, port):
            return port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
