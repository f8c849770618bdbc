"""The report and the history, written by the command line in a process of their own: the service never waits for it."""

import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidecar.record.journal_file import last_written

_TIMEOUT_S = 120.0
_COLUMNS = "120"


@dataclass(frozen=True)
class Document:
    """Its content, or in ``problem`` why there is none."""

    content: bytes
    problem: str = ""


class Documents:
    """Writes one document at a time, with the lowest priority: a trial may be measured meanwhile."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._report: tuple[tuple[Any, ...], Document] | None = None

    def report(self) -> Document:
        """The HTML report of the newest run, kept until the journal changes."""
        with self._lock:
            written = last_written(self._state)
            if self._report is None or self._report[0] != written:
                self._report = written, self._write_report()
            return self._report[1]

    def history(self) -> Document:
        """Promotions, rollbacks and windows, as text."""
        with self._lock:
            return _run("history", str(self._state))

    def _write_report(self) -> Document:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "report.html"
            made = _run("report", str(self._state), "-o", str(path))
            return made if made.problem else Document(path.read_bytes())


def _run(*words: str) -> Document:
    command = ["nice", "-n", "19", sys.executable, "-m", "sidecar", *words]
    environment = {**os.environ, "COLUMNS": _COLUMNS, "NO_COLOR": "1"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Document(b"", f"{words[0]}: {error}")
    if done.returncode:
        return Document(b"", done.stderr.decode(errors="replace").strip() or f"{words[0]} ended with {done.returncode}")
    return Document(done.stdout)
