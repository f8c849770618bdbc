"""One vLLM server process tree: start or adopt, readiness, probe, crash classification, stop."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from vllm_sloguard.agent.engine_http import EngineHttp, Unanswered
from vllm_sloguard.agent.fork_client import ForkServer
from vllm_sloguard.agent.ports import PortListeners, listeners, port_free, port_owner
from vllm_sloguard.agent.process_group import ProcessGroup, socket_folder
from vllm_sloguard.agent.process_identity import ENGINE_ID_VARIABLE, Identity
from vllm_sloguard.agent.serve_command import Args, command_line, entry, served_name, server_arguments
from vllm_sloguard.crash import Crash, classify, classify_file

_POLL_S = 0.1
_FIRST_TOKEN_S = 30.0
_STOP_GRACE_S = 10.0
LOG_TAIL_BYTES = 2**23


class Cancelled(RuntimeError):  # noqa: N818 - it names what happened
    """The wait was cancelled."""


class EngineCrashed(RuntimeError):  # noqa: N818 - the field's word
    """Unexpected exit: the engine ended by itself, or was killed because it hung."""

    def __init__(self, crash: Crash) -> None:
        super().__init__(f"{crash.category}: {crash.evidence}")
        self.crash = crash


@dataclass(frozen=True)
class Launch:
    """Everything a start needs. ``engine_id`` is unique; ``env`` is added to the sidecar's own environment."""

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
        """All arguments of the command line."""
        return {**self.args, "host": self.host, "port": self.port, "shutdown_timeout": self.drain_timeout_s}

    @property
    def environment(self) -> dict[str, str]:
        """The full environment of its first process."""
        own = {ENGINE_ID_VARIABLE: self.engine_id, "VLLM_RPC_BASE_PATH": str(socket_folder(self.engine_id))}
        return {**os.environ, **self.env, **own}


class EngineProcesses(Protocol):
    """The processes of an engine: a ProcessGroup of this machine, or those of an agent."""

    @property
    def identity(self) -> Identity: ...

    def leader_alive(self) -> bool: ...

    def age_s(self) -> float: ...

    def exit_code(self) -> int | None: ...

    def members(self) -> Sequence[psutil.Process]: ...

    def stop(self, grace_s: float) -> None: ...

    def show_stacks(self) -> None: ...

    def kill(self) -> None: ...


class Engine:
    """A vLLM server and its processes."""

    def __init__(self, launch: Launch, group: EngineProcesses, http: EngineHttp | None = None) -> None:
        self.launch = launch
        self.group = group
        self.http = http if http is not None else EngineHttp(launch.host, launch.port, launch.environment)

    @classmethod
    def start(cls, launch: Launch, fork_server: ForkServer | None = None) -> "Engine":
        """Starts vLLM without waiting for it, forked if there is a ``fork_server``.

        Raises EngineCrashed if the port is taken, OSError or ForkServerError if the process can't be created.
        """
        if not port_free(launch.host, launch.port):
            raise port_taken_crash(launch)
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        socket_folder(launch.engine_id).mkdir(mode=0o700, exist_ok=True)
        python, model, folder = launch.python, launch.model, launch.log.parent
        if fork_server is None:
            command = command_line(python, model, launch.all_args)
            return cls(launch, ProcessGroup.start(command, launch.engine_id, launch.log, launch.environment, folder))
        argv = server_arguments(python, model, launch.all_args)
        forked = fork_server.fork(entry(python).module, argv, launch.environment, launch.log, folder)
        return cls(launch, ProcessGroup.of_child(forked, launch.engine_id))

    @classmethod
    def adopt(cls, launch: Launch, identity: Identity) -> "Engine":
        """Takes over an engine started by an earlier sidecar."""
        return cls(launch, ProcessGroup(identity))

    def wait_ready(self, timeout_s: float, cancelled: Callable[[], bool]) -> float:
        """Waits for the first token and returns how many seconds it took.

        Raises EngineCrashed, with all its processes gone, or Cancelled, leaving the engine as it is.
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
                # Another server may have bound the port since the check; its answers would not be the engine's.
                if self.foreign_on_port():
                    taken = port_taken_crash(self.launch)
                    self.group.kill()
                    raise taken
                try:
                    self.probe(min(_FIRST_TOKEN_S, max(timeout_s - waited, 1.0)))
                except Unanswered:
                    time.sleep(_POLL_S)
                    continue
                return time.monotonic() - began
            time.sleep(_POLL_S)

    def probe(self, timeout_s: float) -> None:
        """Requests one token, since /health can be green while the engine hangs. Raises Unanswered."""
        self.http.complete("a", 1, timeout_s)

    def listening(self) -> PortListeners | None:
        """Who listens on its port; None if the system does not reveal it."""
        return listeners(self.launch.host, self.launch.port, [member.pid for member in self.group.members()])

    def owns_port(self) -> bool:
        """Whether one of its processes listens on its port."""
        found = self.listening()
        return found is not None and found.own

    def foreign_on_port(self) -> bool:
        """Whether another server answers on its port, judged by the socket's owner or the model's name."""
        found = self.listening()
        if found is not None:
            return found.foreign
        try:
            return self.http.model() != served_name(self.launch.model, self.launch.args)
        except Unanswered:
            return False

    def alive(self) -> bool:
        """Whether its first process is running."""
        return self.group.leader_alive()

    def crashed(self, phase: str, *, timed_out: bool = False) -> EngineCrashed:
        """Kills what is left and classifies the crash from the log, including where a hung engine was stuck."""
        exit_code = self.group.exit_code()
        if timed_out:
            crash = self.classified(phase, exit_code, timed_out=True)
            self.group.show_stacks()
            self.group.kill()
            return EngineCrashed(crash)
        self.group.kill()
        return EngineCrashed(self.classified(phase, exit_code, timed_out=False))

    def classified(self, phase: str, exit_code: int | None, *, timed_out: bool) -> Crash:
        """The crash, classified from the end of the log."""
        try:
            return classify_file(
                self.launch.log, phase=phase, exit_code=exit_code, timed_out=timed_out, tail_bytes=LOG_TAIL_BYTES
            )
        except FileNotFoundError:
            return classify("", phase=phase, exit_code=exit_code, timed_out=timed_out)

    def stop(self) -> float:
        """Drains requests in flight within the drain timeout, then ends all processes; returns the seconds taken."""
        began = time.monotonic()
        self.group.stop(self.launch.drain_timeout_s + _STOP_GRACE_S)
        return time.monotonic() - began


def port_taken_crash(launch: Launch, owner: str | None = None) -> EngineCrashed:
    """The crash of an engine whose port is taken, by ``owner`` (a clause) if known."""
    clause = port_owner(launch.port) if owner is None else owner
    text = f"OSError: [Errno 98] Address already in use: {launch.host}:{launch.port}{clause}"
    return EngineCrashed(classify(text, phase="starting", exit_code=None))
