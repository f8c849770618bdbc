"""Starts a command in its own session, and stops it with all its descendants.

vLLM's exit code is useless (0 after its engine died), and killing the API server leaves the engine core and workers
behind, so everything is killed as a group and awaited. Only processes proven to be the engine's are signalled: see
vllm_sloguard.agent.process_identity.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil

from vllm_sloguard.agent.private_files import umask_of_children
from vllm_sloguard.agent.process_identity import ENGINE_ID_VARIABLE, Identity, boot_id, is_marked, is_same, started_s
from vllm_sloguard.hooks.stack_dump import ASKS

# Processes that hold a GPU take a while to exit.
_POLL_S = 0.02
_KILL_WAIT_S = 60.0
_TRACKER_WAIT_S = 3.0
_STACKS_S = 0.2


def socket_folder(engine_id: str) -> Path:
    """The folder of an engine's sockets; removed with the engine, since vLLM leaves them behind."""
    return Path(tempfile.gettempdir()) / f"sloguard-{engine_id}"


class NotGoneError(RuntimeError):
    """Processes survived SIGKILL; the text lists them."""


class Child(Protocol):
    """The interface needed of a first process started by this sidecar: subprocess.Popen or Forked."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """The exit code; None while running."""
        ...

    def wait(self, timeout: float) -> int:
        """Waits for the exit code. Raises subprocess.TimeoutExpired."""
        ...


class ProcessGroup:
    """The processes of one engine, started by this sidecar or an earlier one."""

    def __init__(self, identity: Identity, child: Child | None = None) -> None:
        self.identity = identity
        self._child = child
        self._gone = False  # once it is gone, its pid may be reused

    @classmethod
    def start(
        cls, command: Sequence[str], engine_id: str, log: Path, environment: Mapping[str, str], folder: Path
    ) -> "ProcessGroup":
        """Starts ``command`` with its output appended to ``log``.

        A file rather than a pipe: it never blocks the engine, and outlives the sidecar. Raises OSError.
        """
        with log.open("ab") as output:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**environment, ENGINE_ID_VARIABLE: engine_id},
                cwd=folder,
                umask=umask_of_children(),
            )
        return cls.of_child(popen, engine_id)

    @classmethod
    def of_child(cls, child: Child, engine_id: str) -> "ProcessGroup":
        """The group that ``child`` leads."""
        try:
            started_at = started_s(child.pid)
        except OSError:
            started_at = 0.0  # a forked process that has already ended and been reaped by its server
        return cls(Identity(child.pid, started_at, engine_id, boot_id()), child)

    def leader_alive(self) -> bool:
        """Whether the first process, vLLM's API server, is still running."""
        ended = self._child is not None and self._child.poll() is not None
        return not ended and self._leader() is not None

    def _leader(self) -> psutil.Process | None:
        """The first process, unless its pid was reused."""
        try:
            process = psutil.Process(self.identity.pid) if is_same(self.identity) else None
            return process if process is not None and process.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.NoSuchProcess, OSError):
            return None

    def age_s(self) -> float:
        """Seconds since the first process started."""
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - self.identity.started_at, 0.0)

    def exit_code(self) -> int | None:
        """The first process's; negative for a signal, None while running or if another sidecar started it."""
        if self._child is None:
            return None
        if not self.leader_alive():
            with suppress(subprocess.TimeoutExpired):  # the fork server may report it slightly late
                return self._child.wait(1.0)
        return self._child.poll()

    def members(self) -> list[psutil.Process]:
        """All live processes proven to be the engine's, by session or by mark."""
        session = self.identity.pid if self._owns_session() else None
        return [process for process in psutil.process_iter() if self._is_member(process, session)]

    def _owns_session(self) -> bool:
        """Whether the session of the recorded pid is proven to be this engine's.

        Its first process proves it, or any marked process still in it: the kernel does not reuse the id of a
        non-empty session.
        """
        pid = self.identity.pid
        if pid <= 0:
            return False
        if is_same(self.identity):
            return True
        if self._child is not None and not self._gone:
            return self._child.poll() is None or not psutil.pid_exists(pid)
        return any(_session_of(other) == pid and is_marked(other, self.identity.engine_id) for other in psutil.pids())

    def _is_member(self, process: psutil.Process, session: int | None) -> bool:
        try:
            if process.pid == os.getpid() or _has_ended(process):
                return False
        except (psutil.Error, OSError):
            return False
        # A freshly forked process may not lead its session yet.
        if session is not None and session in (process.pid, _session_of(process.pid)):
            return True
        return is_marked(process.pid, self.identity.engine_id)

    def stop(self, grace_s: float) -> None:
        """Terminates the first process, waits ``grace_s`` seconds, and kills what is left. Raises NotGoneError."""
        if grace_s > 0 and self.leader_alive():
            self._terminate_leader()
            deadline = time.monotonic() + grace_s
            while self.leader_alive() and time.monotonic() < deadline:
                time.sleep(0.05)
        self.kill()

    def show_stacks(self) -> None:
        """Makes the processes that run the plugin dump their stacks to the log, one at a time."""
        for member in self.members():
            if _catches(member.pid, ASKS):
                with suppress(psutil.NoSuchProcess):
                    member.send_signal(ASKS)
                time.sleep(_STACKS_S)

    def kill(self) -> None:
        """Kills the whole group and waits until it is gone. Raises NotGoneError.

        Python's resource tracker goes last: it exits after the others, and frees the shared memory they left behind.
        """
        began = time.monotonic()
        while members := self.members():
            waited = time.monotonic() - began
            if waited > _KILL_WAIT_S:
                raise NotGoneError(f"still there after SIGKILL: {', '.join(str(m.pid) for m in members)}")
            trackers = {m for m in members if waited < _TRACKER_WAIT_S and _is_tracker(m)}
            for member in set(members) - trackers:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            if self._child is not None:
                # Only the parent gets the exit code, so psutil must not reap the process first.
                with suppress(subprocess.TimeoutExpired):
                    self._child.wait(1.0)
            others = [member for member in members if member.pid != self.identity.pid]
            _await_end(others, 0.1 if trackers else 1.0)
        self._gone = True
        shutil.rmtree(socket_folder(self.identity.engine_id), ignore_errors=True)

    def _terminate_leader(self) -> None:
        self.signal_leader(signal.SIGTERM)

    def signal_leader(self, number: int) -> None:
        """Signals the first process through a pidfd, so that a reused pid is never signalled."""
        try:
            descriptor = os.pidfd_open(self.identity.pid)
        except ProcessLookupError:
            return
        try:
            if self._leader() is not None:
                signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return
        finally:
            os.close(descriptor)


def _await_end(processes: Sequence[psutil.Process], timeout_s: float) -> None:
    """Waits until all have ended. An orphan may stay a zombie for seconds: its new parent decides when it is reaped."""
    deadline = time.monotonic() + timeout_s
    while not all(map(_has_ended, processes)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _has_ended(process: psutil.Process) -> bool:
    """Whether it is gone or a zombie. A zombie whose threads still run has ended only when they have."""
    try:
        return not process.is_running() or (process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1)
    except psutil.NoSuchProcess:
        return True


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process handles the signal, which would otherwise kill it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return False
