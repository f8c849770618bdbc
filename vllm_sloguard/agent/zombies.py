"""Reaps the processes that a container's first process inherits, without taking its own children's exit codes."""

import os
import time
from collections.abc import Callable
from pathlib import Path

# The agent reads the exit codes of short commands at once.
_LEFT_S = 5.0


class OrphanReaper:
    """``own`` are the children whose exit codes the agent reads later."""

    def __init__(self, own: Callable[[], set[int]], left_s: float = _LEFT_S) -> None:
        self._own = own
        self._left_s = left_s
        self._seen: dict[int, float] = {}

    def reap(self) -> None:
        """Reaps every child that ended a while ago and that nobody has reaped."""
        now, zombies = time.monotonic(), _zombie_children()
        self._seen = {pid: self._seen.get(pid, now) for pid in zombies - self._own()}
        for pid, since in self._seen.items():
            if now - since >= self._left_s:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:  # reaped meanwhile
                    continue


def _zombie_children() -> set[int]:
    me = os.getpid()
    found: set[int] = set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                words = (process / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            if words[0] == b"Z" and int(words[1]) == me:
                found.add(int(process.name))
    return found
