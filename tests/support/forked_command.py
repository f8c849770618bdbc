"""Runs `sloguard` by forking a process that has imported it, which saves a second of CPU time for each."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from zygote import Process, Zygote

_LONGEST_S = 300.0
_zygotes: list[Zygote] = []


class ForkedProcess:
    """A forked `sloguard`, with the part of subprocess.Popen's interface that tests use."""

    def __init__(self, process: Process, output: Path, began_at: int) -> None:
        self.pid = process.pid
        self._process = process
        self._output = output
        self._began_at = began_at  # its place in the output file, in bytes

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while running."""
        return self._process.poll()

    def poll(self) -> int | None:
        """The exit code, None while running."""
        return self._process.poll()

    def wait(self, timeout: float = _LONGEST_S) -> int:
        """The exit code, once it has ended. Raises TimeoutExpired."""
        code = self._process.wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("sloguard", timeout)
        return code

    def communicate(self, timeout: float = _LONGEST_S) -> tuple[str, None]:
        """Its output, once it has ended. Raises TimeoutExpired."""
        self.wait(timeout)
        return self._output.read_bytes()[self._began_at :].decode(), None

    def send_signal(self, number: signal.Signals) -> None:
        """Sends a signal if it is still running."""
        self._process.signal(number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start_forked(argv: Sequence[str], environment: Mapping[str, str], output: Path) -> ForkedProcess:
    """Starts `sloguard ARGV` in this folder, with what it prints appended to ``output``."""
    began_at = output.stat().st_size if output.exists() else 0
    return ForkedProcess(_zygote().start(argv, output, {**os.environ, **environment}), output, began_at)


def run_forked(argv: Sequence[str], environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Runs `sloguard ARGV` to completion, in this folder and with ``environment`` beside this process's own."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        code = _zygote().start(argv, output, {**os.environ, **environment}, errors).wait(_LONGEST_S)
        assert code is not None, f"sloguard {' '.join(argv)} takes longer than {_LONGEST_S:g} s"
        return subprocess.CompletedProcess(["sloguard", *argv], code, output.read_text(), errors.read_text())


def _zygote() -> Zygote:
    """The one of these tests; it ends with the thread that started it."""
    if not _zygotes or not _zygotes[-1].alive:
        _zygotes.append(Zygote())
    return _zygotes[-1]
