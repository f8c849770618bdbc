"""Starts `sloguard` by forking a process that has already imported it, since the imports take longer than a run.

Each child has its own session, signals, environment and output. The zygote reads one JSON object per line,
{"argv": [...], "env": {...}, "output": PATH, "errors": PATH, "folder": PATH}, and answers {"pid": N}; when a child has
ended, it writes {"ended": N, "code": exit code, negative for a signal}.
"""

import ctypes
import importlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
# What `serve` imports only when it is needed: a third of its CPU time in a run.
_IMPORTED_LATE = ("scipy.special", "sidecar.page.app", "uvicorn")
_STREAMS = ("output", "errors")
ROOT = Path(__file__).resolve().parents[2]


class Process:
    """A `sloguard` process, running or ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended = threading.Event()
        self.code: int | None = None
        self.ended_at = 0.0

    def poll(self) -> int | None:
        """The exit code, None while running."""
        return self.code if self.ended.is_set() else None

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, None if still running after ``timeout_s`` seconds."""
        self.ended.wait(timeout_s)
        return self.poll()

    def signal(self, number: int) -> None:
        """Sends a signal if it is still running."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Zygote:
    """The parent of every `sloguard` of a campaign; safe to use from several threads."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        own = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._popen = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **own, **(environment or {})},
        )
        self._pids: queue.Queue[int] = queue.Queue()
        self._known: dict[int, Process] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it can start another one."""
        return self._popen.poll() is None

    def start(self, argv: Sequence[str], output: Path, env: Mapping[str, str], errors: Path | None = None) -> Process:
        """Starts `sloguard ARGV` here with its output appended to ``output``; that of stderr to ``errors``."""
        asked = {
            "argv": argv,
            "output": str(output),
            "errors": str(errors or output),
            "env": dict(env),
            "folder": str(Path.cwd()),
        }
        with self._lock:
            assert self._popen.stdin is not None
            self._popen.stdin.write(json.dumps(asked) + "\n")
            self._popen.stdin.flush()
            return self._known[self._pids.get(timeout=60)]

    def close(self) -> None:
        """Ends the zygote; its children are left alone."""
        self._popen.kill()
        self._popen.wait()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            told = json.loads(line)
            if "pid" in told:
                self._known[told["pid"]] = Process(told["pid"])
                self._pids.put(told["pid"])
            elif (process := self._known.get(told["ended"])) is not None:
                process.code, process.ended_at = told["code"], time.monotonic()
                process.ended.set()


def main() -> int:
    """Serves fork requests until stdin closes."""
    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    from sidecar.cli.main import app

    _end_with_parent()
    assert app is not None
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    pending = b""
    while True:
        for ended in _reaped():
            answers.write(json.dumps(ended) + "\n")
        if not select.select([0], [], [], 0.03)[0]:
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return 0
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            asked = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _become(asked)
            answers.write(json.dumps({"pid": pid}) + "\n")


def _end_with_parent() -> None:
    """Dies with its parent, so that a killed campaign leaves nothing behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _reaped() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found.append({"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def _become(asked: dict[str, Any]) -> NoReturn:
    """The forked process becomes `sloguard`."""
    code = 70
    try:
        os.setsid()
        _end_with_parent()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(asked["folder"])
        output, errors = (os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for name in _STREAMS)
        for number, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (errors, 2)):
            os.dup2(number, target)
        os.closerange(3, 256)
        os.environ.update(asked["env"])
        sys.argv = ["sloguard", *asked["argv"]]
        from sidecar.cli.main import main as sloguard

        sloguard()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    except BaseException:  # noqa: BLE001 - the boundary of a process
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
