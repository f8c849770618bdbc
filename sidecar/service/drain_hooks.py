"""The operator's commands around a drain: what /ready does for load balancers that poll it, these do for others.

They run beside the loop: a command that hangs delays neither supervision nor a stop.
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from sidecar.config.window import Hooks
from sidecar.format import Say
from sidecar.record.events import EventKind, Operations
from sidecar.record.journal import JournalError

_SHOWN_CHARS = 200
_TAIL_BYTES = 4096
_POLL_S = 0.05
_FIRST_RETRY_S, _LONGEST_RETRY_S = 5.0, 300.0


@dataclass
class _Command:
    """A hook that runs. Its end is the process's: what it leaves in the background may keep its output open."""

    name: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    timeout_s: float
    deadline: float

    def problem(self) -> str | None:
        """Why it failed, in one sentence; empty when it succeeded, None while it runs."""
        code = self.process.poll()
        if code is None and time.monotonic() < self.deadline:
            return None
        with self.output:
            if code is None:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                return f"the hook {self.name} failed: no end within {self.timeout_s:g} s"
            return "" if code == 0 else f"the hook {self.name} failed: exit code {code}: {self._last_line()}"

    def _last_line(self) -> str:
        self.output.seek(max(self.output.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
        lines = self.output.read().decode("utf-8", errors="replace").strip().splitlines()
        return lines[-1][:_SHOWN_CHARS] if lines else ""


class HookRunner:
    """Runs the hooks; each ``before_drain`` is followed by an ``after_restore``, if need be of a later sidecar."""

    def __init__(self, hooks: Hooks, operations: Operations, say: Say) -> None:
        self._hooks = hooks
        self._operations = operations
        self._say = say
        self._reported = ""
        self._running: _Command | None = None
        self._retry_s = _FIRST_RETRY_S
        self._not_before = 0.0

    def before_drain(self, interrupted: Callable[[], bool]) -> str:
        """Runs ``before_drain`` until it ends or ``interrupted``; why it failed, or nothing. Raises JournalError."""
        if not self._hooks.before_drain and not self._hooks.after_restore:
            return ""
        self._forget_running()
        if self._hooks.after_restore:
            self._operations.record(EventKind.HOOK_BEFORE)
        self._retry_s, self._not_before = _FIRST_RETRY_S, 0.0
        command = self._start("before_drain", self._hooks.before_drain)
        while isinstance(command, _Command):
            problem = command.problem()
            if problem is not None:
                return problem
            if interrupted():
                command.deadline = 0.0
            time.sleep(_POLL_S)
        return command

    def after_restore(self) -> None:
        """Starts ``after_restore`` where it is still owed, or looks whether it has ended. Never waits.

        One that fails is started again, with growing pauses.
        """
        if not self._hooks.after_restore:
            return
        try:
            if self._running is None:
                if time.monotonic() < self._not_before or not self._operations.hook_owed():
                    return
                started = self._start("after_restore", self._hooks.after_restore)
                if isinstance(started, _Command):
                    self._running = started
                    return
                problem = started
            else:
                ended = self._running.problem()
                if ended is None:
                    return
                self._running, problem = None, ended
                if not problem:
                    self._operations.record(EventKind.HOOK_AFTER)
        except JournalError as error:
            problem = str(error)
        if problem:
            self._not_before = time.monotonic() + self._retry_s
            self._retry_s = min(self._retry_s * 2, _LONGEST_RETRY_S)
            if problem != self._reported:
                self._say(f"{problem}; it is tried again")
        self._reported = problem

    def finish(self, within_s: float) -> None:
        """Gives a running ``after_restore`` a moment; one that takes longer goes on without the sidecar."""
        deadline = time.monotonic() + within_s
        self.after_restore()
        while self._running is not None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            self.after_restore()

    def _forget_running(self) -> None:
        """A drain begins: an ``after_restore`` of an earlier one must not end after this one's ``before_drain``."""
        if self._running is not None:
            self._running.deadline = 0.0
            self._running.problem()
            self._running = None

    def _start(self, name: str, argv: list[str]) -> _Command | str:
        """The command, or why it did not start; empty where there is none."""
        if not argv:
            return ""
        output = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed with the command
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except (OSError, ValueError) as error:
            output.close()
            return f"the hook {name} failed: {error}"
        timeout_s = self._hooks.timeout
        return _Command(name, process, output, timeout_s, time.monotonic() + timeout_s)
