"""Identifies an engine's processes: a pid is trusted only with its boot id and start time, or the engine's mark.

State folders outlive reboots and containers, and pids are reused. A process not proven to be an engine's is never
signalled.
"""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

ENGINE_ID_VARIABLE = "SLOGUARD_ENGINE_ID"
_TICK_S = 0.02
_AGENT_BOOT = "agent "


@dataclass(frozen=True)
class Identity:
    """Identifies an engine's processes across restarts of the sidecar.

    ``engine_id`` is in the environment of all its processes, even those that left the session. A forked process,
    whose environment /proc does not reflect, is recognised by the log its output goes to. ``boot_id`` is empty in
    journals of earlier versions.
    """

    pid: int
    started_at: float  # seconds since the boot
    engine_id: str
    boot_id: str = ""

    @property
    def remote(self) -> bool:
        """Whether the process is an agent's, and its pid means nothing on this machine."""
        return self.boot_id.startswith(_AGENT_BOOT)


def agent_boot(address: str) -> str:
    """Stands for the boot id of processes that the agent at ``address`` runs."""
    return f"{_AGENT_BOOT}{address}"


@cache
def boot_id() -> str:
    """The kernel's id of this boot; empty if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def log_of(folder: Path, engine_id: str) -> Path:
    """The log file of an engine, in a folder of logs."""
    return folder / f"engine-{engine_id}.log"


def identify(pid: int, engine_id: str) -> Identity:
    """The identity of a running process. Raises OSError."""
    return Identity(pid, started_s(pid), engine_id, boot_id())


def started_s(pid: int) -> float:
    """When a process started, seconds since the boot. Raises OSError.

    psutil's create_time shifts when the wall clock is set, and would no longer match the recorded one.
    """
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def is_same(identity: Identity) -> bool:
    """Whether the process with that pid, alive or a zombie, is proven to be the recorded one."""
    try:
        if identity.pid <= 0 or abs(started_s(identity.pid) - identity.started_at) >= _TICK_S:
            return False
    except OSError:
        return False
    if identity.boot_id:
        return identity.boot_id == boot_id()
    return is_marked(identity.pid, identity.engine_id)


def is_marked(pid: int, engine_id: str) -> bool:
    """Whether a process has the mark of ``engine_id``: in its environment, or in its output file."""
    try:
        if psutil.Process(pid).environ().get(ENGINE_ID_VARIABLE) == engine_id:
            return True
    except (psutil.Error, OSError):
        pass
    try:
        return output_of(pid).name == log_of(Path(), engine_id).name
    except OSError:
        return False


def output_of(pid: int) -> Path:
    """The file a process's output goes to, even if deleted. Raises OSError."""
    return Path(str(Path(f"/proc/{pid}/fd/1").readlink()).removesuffix(" (deleted)"))


def engines_writing_to(folder: Path) -> set[str]:
    """The ids of the engines with a process that writes to its log in ``folder``."""
    found: set[str] = set()
    folder = folder.resolve()
    for pid in psutil.pids():
        try:
            log = output_of(pid)
        except OSError:
            continue
        engine_id = log.stem.removeprefix("engine-")
        if log == log_of(folder, engine_id):
            found.add(engine_id)
    return found


def leader_of(engine_id: str) -> Identity | None:
    """The first process of a running engine: the marked one that leads its session."""
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == pid and is_marked(pid, engine_id):
                return identify(pid, engine_id)
        except OSError:
            continue
    return None


def command_words(pid: int) -> list[str]:
    """A process's command line; empty if it can't be read."""
    try:
        return psutil.Process(pid).cmdline()
    except (psutil.Error, OSError):
        return []
