"""The operator's commands around a drain: what /ready does for load balancers that ask, these do for others."""

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress

from sidecar.config.window import Hooks
from sidecar.record.events import EventKind, Operations
from sidecar.record.journal import JournalError

_SHOWN_CHARS = 200


class HookRunner:
    """Runs them; who was told of a drain is told of its end, if need be by the next sidecar."""

    def __init__(self, hooks: Hooks, operations: Operations, say: Callable[[str], None]) -> None:
        self._hooks = hooks
        self._operations = operations
        self._say = say
        self._said = ""

    def before_drain(self) -> str:
        """Tells of a drain; why that failed in one sentence, or nothing. Raises JournalError."""
        if self._hooks.after_restore:
            self._operations.record(EventKind.HOOK_BEFORE)
        return self._run("before_drain", self._hooks.before_drain)

    def after_restore(self) -> None:
        """Tells of the drain's end where that is still owed; what fails is tried again with the next call."""
        try:
            if not self._hooks.after_restore or not self._operations.hook_owed():
                return
            problem = self._run("after_restore", self._hooks.after_restore)
            if not problem:
                self._operations.record(EventKind.HOOK_AFTER)
        except JournalError as error:
            problem = str(error)
        if problem and problem != self._said:
            self._say(f"{problem}; it is tried again")
        self._said = problem

    def _run(self, name: str, argv: list[str]) -> str:
        if not argv:
            return ""
        named = f"the hook {name} failed"
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return f"{named}: {error}"
        with process:
            try:
                output, _ = process.communicate(timeout=self._hooks.timeout)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                return f"{named}: no end within {self._hooks.timeout:g} s"
        if process.returncode == 0:
            return ""
        last = output.strip().splitlines()[-1:] or [""]
        return f"{named}: exit code {process.returncode}: {last[0][:_SHOWN_CHARS]}"
