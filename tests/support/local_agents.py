"""The agents that sidecars of tests start by themselves."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil

from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.agent.process_identity import Identity

_LOCKS = ("agent/lock", "*/agent/lock", "*/*/agent/lock")


def local_agent_pid(state: Path) -> int | None:
    """The agent of a state folder; None without one."""
    # Without taking the lock, which an agent that starts now would not get then.
    with suppress(OSError, ValueError, psutil.Error):
        pid = int((state / "agent" / "lock").read_text())
        if "vllm_sloguard.agent" in psutil.Process(pid).cmdline():
            return pid
    return None


def end_local_agents(folder: Path) -> None:
    """Kills the agents of the state folders in ``folder`` that a killed sidecar has left behind, and their engines."""
    for lock in [lock for pattern in _LOCKS for lock in folder.glob(pattern)]:
        state = lock.parent.parent
        if (pid := local_agent_pid(state)) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            end_engines(state)


def end_engines(state: Path) -> None:
    """Kills every engine that logs in a state folder."""
    for log in (state / "logs").glob("engine-*.log"):
        ProcessGroup(Identity(-1, 0.0, log.stem.removeprefix("engine-"))).kill()
