"""A command in a session of its own, and everything that it starts.

A process is its id and its start time, so that an id which the system has used again is never mistaken for it. vLLM's
exit code says nothing (0 after its engine died), and killing its API server leaves the engine and the workers behind:
so whatever is stopped here is killed as a whole, and seen gone.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from vllm_sloguard.hooks.stack_dump import ASKS

ENGINE_ID_VARIABLE = "SLOGUARD_ENGINE_ID"
# A process that holds a GPU takes a while to go.
_KILL_WAIT_S = 60.0
_TICK_S = 0.02
_TRACKER_WAIT_S = 3.0
_STACKS_S = 0.2


def log_of(folder: Path, engine_id: str) -> Path:
    """Where an engine's processes write, in a folder of logs; it is what a forked one is found by."""
    return folder / f"engine-{engine_id}.log"


def socket_folder(engine_id: str) -> Path:
    """Where an engine's processes have their sockets; removed with them, as vLLM leaves them behind."""
    return Path(tempfile.gettempdir()) / f"sloguard-{engine_id}"


class NotGoneError(RuntimeError):
    """Processes outlived SIGKILL; the text lists them."""


@dataclass(frozen=True)
class Identity:
    """What finds a process group again after the sidecar itself was restarted.

    ``engine_id`` marks the environment of every process in it, also of one that left the session; a forked one, whose
    environment the system does not show, is marked by the name of its log.
    """

    pid: int
    started_at: float  # seconds since the boot
    engine_id: str


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
            started_at = _started_s(child.pid)
        except OSError:
            started_at = 0.0  # a forked one that has ended already, and was waited for by its server
        return cls(Identity(child.pid, started_at, engine_id), child)

    def leader_alive(self) -> bool:
        """Whether the first process, vLLM's API server, still runs."""
        ended = self._child is not None and self._child.poll() is not None
        return not ended and self._leader() is not None

    def _leader(self) -> psutil.Process | None:
        """The first process itself, and not another one that the system has given its id."""
        if self.identity.pid <= 0:
            return None
        try:
            process = psutil.Process(self.identity.pid)
            return process if self._has_its_id() and process.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.NoSuchProcess, OSError):
            return None

    def _has_its_id(self) -> bool:
        """Whether the first process, alive or not waited for yet, has the id that is known of it."""
        try:
            return abs(_started_s(self.identity.pid) - self.identity.started_at) < _TICK_S
        except OSError:
            return False

    def exit_code(self) -> int | None:
        """Of the first process; negative for a signal; None while it runs, or when another sidecar started it."""
        if self._child is None:
            return None
        if not self.leader_alive():
            with suppress(subprocess.TimeoutExpired):  # the word of it may come a little later than its end
                return self._child.wait(1.0)
        return self._child.poll()

    def members(self) -> list[psutil.Process]:
        """Every living process of the session, and every other one with the engine's mark.

        A process that now has the first one's id and is not it leads a session that is none of ours.
        """
        pid = self.identity.pid
        session = pid if pid > 0 and (self._has_its_id() or not psutil.pid_exists(pid) or self._child) else None
        return [process for process in psutil.process_iter() if self._is_member(process, session)]

    def _is_member(self, process: psutil.Process, session: int | None) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                return False
            # A process that was forked just now does not lead its session yet.
            if session is not None and session in (process.pid, os.getsid(process.pid)):
                return True
            marked = process.environ().get(ENGINE_ID_VARIABLE) == self.identity.engine_id
            return marked or _log(process).name == log_of(Path(), self.identity.engine_id).name
        except (psutil.Error, OSError):
            return False

    def stop(self, grace_s: float) -> None:
        """Asks the first process to end, waits for ``grace_s`` seconds, and kills what is left. Raises NotGoneError."""
        if grace_s > 0 and self.leader_alive():
            self._signal_leader(signal.SIGTERM)
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
        shutil.rmtree(socket_folder(self.identity.engine_id), ignore_errors=True)

    def _signal_leader(self, number: signal.Signals) -> None:
        try:
            os.kill(self.identity.pid, number)
        except ProcessLookupError:
            return


def _started_s(pid: int) -> float:
    """When a process started, seconds since the boot. Raises OSError.

    psutil's create_time moves when the wall clock is set: every engine would look like another one from then on.
    """
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def writing_to(folder: Path) -> set[str]:
    """The engines of which a process writes to its log in ``folder``."""
    found: set[str] = set()
    folder = folder.resolve()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            log = _log(process)
            engine_id = log.stem.removeprefix("engine-")
            if log == log_of(folder, engine_id):
                found.add(engine_id)
    return found


def _log(process: psutil.Process) -> Path:
    """Where a process's output goes, also when that was removed. Raises OSError."""
    return Path(str(Path(f"/proc/{process.pid}/fd/1").readlink()).removesuffix(" (deleted)"))


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
