"""A command in a session of its own, and everything that it starts.

vLLM's exit code says nothing (0 after its engine died), and killing its API server leaves the engine core and the
workers behind: what is stopped here is killed as a group and awaited. Only processes that are proven to be the engine's
are signalled: see sidecar.engine.process_identity.
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

from sidecar.engine.process_identity import ENGINE_ID_VARIABLE, Identity, boot_id, is_marked, is_same, started_s
from vllm_sloguard.hooks.stack_dump import ASKS

# A process that holds a GPU takes a while to go.
_KILL_WAIT_S = 60.0
_TRACKER_WAIT_S = 3.0
_STACKS_S = 0.2


def socket_folder(engine_id: str) -> Path:
    """Where an engine's processes have their sockets; removed with them, as vLLM leaves them behind."""
    return Path(tempfile.gettempdir()) / f"sloguard-{engine_id}"


class NotGoneError(RuntimeError):
    """Processes outlived SIGKILL; the text lists them."""


class Child(Protocol):
    """What is asked of a first process that this sidecar has started: subprocess.Popen has it, and Forked."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        ...

    def wait(self, timeout: float) -> int:
        """Waits for the exit code. Raises subprocess.TimeoutExpired."""
        ...


class ProcessGroup:
    """The processes of one engine, whether this process started them or an earlier sidecar did."""

    def __init__(self, identity: Identity, child: Child | None = None) -> None:
        self.identity = identity
        self._child = child
        self._gone = False  # seen gone once: from then on its pid may be anybody's

    @classmethod
    def start(
        cls, command: Sequence[str], engine_id: str, log: Path, environment: Mapping[str, str], folder: Path
    ) -> "ProcessGroup":
        """Starts ``command`` with its output appended to ``log``.

        A file, not a pipe: it never fills up, and it outlives the sidecar. Raises OSError.
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
            )
        return cls.of_child(popen, engine_id)

    @classmethod
    def of_child(cls, child: Child, engine_id: str) -> "ProcessGroup":
        """The group that ``child`` leads."""
        try:
            started_at = started_s(child.pid)
        except OSError:
            started_at = 0.0  # a forked one that has already ended and was reaped by its server
        return cls(Identity(child.pid, started_at, engine_id, boot_id()), child)

    def leader_alive(self) -> bool:
        """Whether the first process, vLLM's API server, still runs."""
        ended = self._child is not None and self._child.poll() is not None
        return not ended and self._leader() is not None

    def _leader(self) -> psutil.Process | None:
        """The first process, unless the system has given its pid to another one."""
        try:
            process = psutil.Process(self.identity.pid) if is_same(self.identity) else None
            return process if process is not None and process.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.NoSuchProcess, OSError):
            return None

    def exit_code(self) -> int | None:
        """Of the first process; negative for a signal; None while it runs, or when another sidecar started it."""
        if self._child is None:
            return None
        if not self.leader_alive():
            with suppress(subprocess.TimeoutExpired):  # the word of it may come a little later than its end
                return self._child.wait(1.0)
        return self._child.poll()

    def members(self) -> list[psutil.Process]:
        """Every living process that is proven to be the engine's: of its session, or with its mark."""
        session = self.identity.pid if self._owns_session() else None
        return [process for process in psutil.process_iter() if self._is_member(process, session)]

    def _owns_session(self) -> bool:
        """Whether the session of the recorded pid is proven to be this engine's.

        Its first process proves it while it is there, or a marked process that is still in it: the kernel does not
        reuse the number of a session that is not empty.
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
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                return False
        except (psutil.Error, OSError):
            return False
        # A process that was forked just now does not lead its session yet.
        if session is not None and session in (process.pid, _session_of(process.pid)):
            return True
        return is_marked(process.pid, self.identity.engine_id)

    def stop(self, grace_s: float) -> None:
        """Asks the first process to end, waits for ``grace_s`` seconds, and kills what is left. Raises NotGoneError."""
        if grace_s > 0 and self.leader_alive():
            self._terminate_leader()
            deadline = time.monotonic() + grace_s
            while self.leader_alive() and time.monotonic() < deadline:
                time.sleep(0.05)
        self.kill()

    def show_stacks(self) -> None:
        """Has the processes that the plugin runs in write their stacks to the log, one after the other."""
        for member in self.members():
            if _catches(member.pid, ASKS):
                with suppress(psutil.NoSuchProcess):
                    member.send_signal(ASKS)
                time.sleep(_STACKS_S)

    def kill(self) -> None:
        """Kills the whole group and waits until it is gone. Raises NotGoneError.

        Python's resource tracker comes last: it ends by itself after the others, and then frees the shared memory that
        they can't free any more.
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
                # Its own parent alone learns a process's exit code: psutil must not be the first to wait for it.
                with suppress(subprocess.TimeoutExpired):
                    self._child.wait(1.0)
            psutil.wait_procs([m for m in members if m.pid != self.identity.pid], timeout=0.1 if trackers else 1.0)
        self._gone = True
        shutil.rmtree(socket_folder(self.identity.engine_id), ignore_errors=True)

    def _terminate_leader(self) -> None:
        """Signals the first process through a descriptor, so that a reused pid is not signalled in its place."""
        try:
            descriptor = os.pidfd_open(self.identity.pid)
        except ProcessLookupError:
            return
        try:
            if self._leader() is not None:
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        except ProcessLookupError:
            return
        finally:
            os.close(descriptor)


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal, which would end it otherwise."""
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
