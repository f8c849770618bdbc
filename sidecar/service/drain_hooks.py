"""Runs the operator's drain hooks, for load balancers that do not poll /ready.

Hooks run outside the loop, so one that hangs delays neither supervision nor shutdown.
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
from vllm_sloguard.agent.private_files import umask_of_children

_SHOWN_CHARS = 200
_TAIL_BYTES = 4096
_POLL_S = 0.05
_FIRST_RETRY_S, _LONGEST_RETRY_S = 5.0, 300.0


@dataclass
class _Command:
    """A running hook. It ends when its process does, even if a background child keeps the output open."""

    name: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    timeout_s: float
    deadline: float

    def problem(self) -> str | None:
        """Why it failed; empty if it succeeded, None while it is running."""
        code = self.process.poll()
        if code is None and time.monotonic() < self.deadline:
            return None
        with self.output:
            if code is None:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                return f"the hook {self.name} failed: timed out after {self.timeout_s:g} s"
            return "" if code == 0 else f"the hook {self.name} failed: exit code {code}: {self._last_line()}"

    def _last_line(self) -> str:
        self.output.seek(max(self.output.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
        lines = self.output.read().decode("utf-8", errors="replace").strip().splitlines()
        return lines[-1][:_SHOWN_CHARS] if lines else ""


class HookRunner:
    """Runs the hooks. Every ``before_drain`` gets its ``after_restore``, from a later sidecar if this one dies."""

    def __init__(self, hooks: Hooks, operations: Operations, say: Say) -> None:
        self._hooks = hooks
        self._operations = operations
        self._say = say
        self._reported = ""
        self._running: _Command | None = None
        self._retry_s = _FIRST_RETRY_S
        self._not_before = 0.0

    def before_drain(self, interrupted: Callable[[], bool]) -> str:
        """Runs ``before_drain`` until it ends or ``interrupted``; returns why it failed, or "". Raises JournalError."""
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
        """Starts ``after_restore`` if it is due, or checks whether it has finished. Never blocks.

        A failed hook is retried with exponential backoff.
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
                self._say(f"{problem}; it will be retried")
        self._reported = problem

    def finish(self, within_s: float) -> None:
        """Waits up to ``within_s`` for ``after_restore``; a slower one is left running when the sidecar exits."""
        deadline = time.monotonic() + within_s
        self.after_restore()
        while self._running is not None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            self.after_restore()

    def _forget_running(self) -> None:
        """Kills an earlier drain's ``after_restore``, which must not finish after this drain's ``before_drain``."""
        if self._running is not None:
            self._running.deadline = 0.0
            self._running.problem()
            self._running = None

    def _start(self, name: str, argv: list[str]) -> _Command | str:
        """The started command, or why it did not start; empty if none is configured."""
        if not argv:
            return ""
        output = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed with the command
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=umask_of_children(),
            )
        except (OSError, ValueError) as error:
            output.close()
            return f"the hook {name} failed: {error}"
        timeout_s = self._hooks.timeout
        return _Command(name, process, output, timeout_s, time.monotonic() + timeout_s)
