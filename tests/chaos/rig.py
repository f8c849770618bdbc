"""The test rig of one run: a state folder, its `sloguard serve`, fake engines, and two continuous watchers."""

import contextlib
import http.client
import itertools
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import clock
import psutil
import yaml
from zygote import Process, Zygote

from vllm_sloguard.agent.ports import port_free
from vllm_sloguard.agent.process_identity import ENGINE_ID_VARIABLE

SUPPORT = Path(__file__).resolve().parents[1] / "support"
sys.path.append(str(SUPPORT))

from local_agents import end_local_agents  # noqa: E402 - tests/support is not installed

FAKE = SUPPORT / "fake_vllm.py"
MODEL = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "model"
SLOGUARD = [sys.executable, "-m", "sidecar"]
POLL_S = 0.02
_WATCHED_EVERY_S = 0.1
# Below the ephemeral range and the ports of trials, so that no other run takes one while it is free.
_PORTS = itertools.cycle(range(20000, 30000))
_ports_lock = threading.Lock()


@dataclass(frozen=True)
class Settings:
    """Settings of a run. ``improves``: whether the search can find something better than the incumbent."""

    improves: bool = True
    # Room for an unmeasured start of each side of the validation; a window ends after its last trial.
    duration_s: float = 60.0
    load_s: float = 0.1
    telemetry: bool = False
    # Requests a second that the serving engine reports.
    traffic: float = 0.0
    longest_life_s: float = 300.0
    ignore_sigterm: bool = False
    page: bool = False
    start_s: float = 0.1
    # Windows by the clock; with a clock of its own, a run can jump from one to the next.
    cron: str = ""
    latest_start_s: float = 3.0
    # Commands that get the run's folder as $0; see Rig.hook_processes.
    before_drain: str = ""
    after_restore: str = ""
    hook_timeout_s: float = 120.0
    # Size of a separate file system for the state folder; needs root.
    disk_bytes: int = 0

    @property
    def incumbent(self) -> int:
        """The incumbent's max_num_seqs; more is faster."""
        return 2 if self.improves else 12


@dataclass
class Seen:
    """The watchers' observations."""

    trials: dict[tuple[int, int], tuple[Any, ...]] = field(default_factory=dict[tuple[int, int], tuple[Any, ...]])
    lost: list[str] = field(default_factory=list[str])
    unanswered_at: float = 0.0
    answered_at: float = 0.0


@dataclass(frozen=True)
class Bounds:
    """Promised times, in seconds. ``late_s``: from a window's end to the end of the restore after it."""

    outage_s: float
    late_s: float
    # The longest outage beyond the engine's own start, where a hook or a client is the fault.
    beyond_start_s: float


PROMISED = Bounds(outage_s=30.0, late_s=1.0, beyond_start_s=1.0)


class Rig:
    """Starts, watches and cleans up one run."""

    def __init__(self, zygote: Zygote, settings: Settings, folder: Path, bounds: Bounds = PROMISED) -> None:
        self.settings = settings
        self.bounds = bounds
        self.folder = folder
        self.fake = folder / "fake"
        self.fake.mkdir(parents=True)
        self.clock = folder / "clock"
        self.state = folder / "state"
        self.state.mkdir(mode=0o700)
        self.output = self.state / "output.txt" if settings.disk_bytes else folder / "output.txt"
        self._zygote = zygote
        self.port, self.metrics_port = _own_port(), _own_port()
        self.page_port = _own_port() if settings.page else 0
        self.sidecar: Process | None = None
        self.sidecars: list[Process] = []
        self.seen = Seen()
        self.served = 0
        self.bystanders: list[subprocess.Popen[bytes]] = []
        self.struck_at: float | None = None
        # Where windows were due: stretches of the sidecar's clock, in seconds since the epoch.
        self.stretches: list[tuple[float, float]] = []
        self._offset_s = 0
        self._trials_lock = threading.RLock()
        self._closing = threading.Event()
        self._watchers: list[threading.Thread] = []
        if settings.disk_bytes:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={settings.disk_bytes},mode=0700", "none", str(self.state)]
            subprocess.run(mount, check=True, capture_output=True)
        if settings.ignore_sigterm:
            (self.fake / "ignore_sigterm").touch()
        self.config_file = self._configure()

    def _configure(self) -> Path:
        """Short durations for the workload; the sidecar's own timeouts keep their defaults."""
        env = {
            "FAKE_FOLDER": str(self.fake),
            # The fake engine needs packages of this environment for its telemetry.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FAKE_SERVING_PORT": str(self.port),
            "FAKE_START_S": str(self.settings.start_s),
            "FAKE_LOAD_S": str(self.settings.load_s),
        }
        if self.settings.telemetry:
            env["FAKE_TELEMETRY"] = "1"
        if self.settings.traffic:
            env |= {"FAKE_TELEMETRY": "whole", "FAKE_TRAFFIC": str(self.settings.traffic)}
        env["FAKE_LONGEST_LIFE_S"] = str(self.settings.longest_life_s)
        window: dict[str, Any] = {"duration": f"{self.settings.duration_s}s", "notice": "0s"}
        if self.settings.cron:
            # A window that a fault ends must not keep the next one from opening.
            window |= {
                "cron": self.settings.cron,
                "after_failure": "0s",
                "latest_start": f"{self.settings.latest_start_s}s",
            }
        if self.settings.before_drain or self.settings.after_restore:
            hook = {
                name: ["sh", "-c", script, str(self.folder)]
                for name in ("before_drain", "after_restore")
                if (script := getattr(self.settings, name))
            }
            window["hooks"] = {**hook, "timeout": f"{self.settings.hook_timeout_s:g}s"}
        content = {
            "model": str(MODEL),
            "engine": {
                "args": {"max-num-seqs": self.settings.incumbent, "max-model-len": 512},
                "python": str(FAKE),
                "env": env,
                "port": self.port,
                "drain_timeout_s": 1,
                "start_timeout_s": 5,
                "forked_trials": False,
                "live_trials": False,
            },
            "slo": {"ttft_p99_ms": 500, "itl_p99_ms": 60, "e2e_p99_ms": 3000, "error_rate": 0.01},
            "workload": {
                "rate": 1000.0,
                "requests": 50,
                "input_tokens": 128,
                "output_tokens": 32,
                "request_timeout_s": 5.0,
            },
            "search": {
                "optimizer": "random",
                "budget": 3,
                "knobs": {"max_num_seqs": {"low": 4, "high": 8 if self.settings.improves else 6}},
            },
            "promotion": {"pairs": [2]},
            "window": window,
            "state": str(self.state),
            "metrics": {"port": self.metrics_port},
            "page": {"port": self.page_port},
        }
        path = self.folder / "sloguard.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    # The sidecar

    def start(self, environment: Mapping[str, str] | None = None) -> Process:
        """Starts `sloguard serve` without waiting for it."""
        self.sidecar = self.command("serve", "-c", str(self.config_file), environment=environment)
        self.sidecars.append(self.sidecar)
        return self.sidecar

    def wall(self) -> float:
        """The sidecar's wall clock, seconds since the epoch."""
        return time.time() + self._offset_s

    def jump(self, seconds: float, *, counts: bool = True) -> None:
        """Moves the sidecar's clock; with ``counts``, what it passes on the way forward is due."""
        if seconds < 0 or not counts:
            self.end_stretch()
        self._offset_s += round(seconds)
        clock.set_seconds(self.clock, self._offset_s)
        if seconds < 0:
            self.begin_stretch()

    def begin_stretch(self) -> None:
        """Windows are due from here on."""
        self.stretches.append((self.wall(), math.inf))

    def end_stretch(self) -> None:
        """Up to here, windows were due."""
        if self.stretches and math.isinf(self.stretches[-1][1]):
            self.stretches[-1] = (self.stretches[-1][0], self.wall())

    def command(self, *argv: str, output: Path | None = None, environment: Mapping[str, str] | None = None) -> Process:
        """Starts `sloguard ARGV`: forked, or with LD_PRELOAD as a new process, since the dynamic loader reads that."""
        if environment and "LD_PRELOAD" in environment:
            return _started([*clock.command(self.clock), *SLOGUARD, *argv], output or self.output, environment)
        return self._zygote.start(argv, output or self.output, environment or {})

    def retune(self) -> str:
        """Requests a window; returns the refusal, if any."""
        said = self.folder / "retune.txt"
        said.unlink(missing_ok=True)
        code = self.command("retune", "--now", "-c", str(self.config_file), output=said).wait(60)
        return "" if code == 0 else said.read_text()

    def said(self) -> str:
        """The combined output of the sidecars."""
        with suppress(OSError):
            return self.output.read_text(errors="replace")
        return ""

    # The journal

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Queries the journal as an outside reader; empty if there is none yet."""
        path = self.state / "journal.sqlite"
        if not path.is_file():
            return []
        try:
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=2)) as db:
                return db.execute(query, values).fetchall()
        except sqlite3.Error:
            return []

    def last_state(self) -> tuple[int, str]:
        """The id and name of the last state; 0 and "" before the first."""
        rows = self.rows("SELECT id, state FROM states ORDER BY id DESC LIMIT 1")
        return rows[0] if rows else (0, "")

    def await_state(self, name: str, after: int, timeout_s: float, *, before: str = "") -> bool:
        """Waits for a state with an id above ``after``; no longer once the state ``before`` was entered."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            entered = {state for (state,) in self.rows("SELECT state FROM states WHERE id > ?", after)}
            if name in entered or before in entered:
                return name in entered
            time.sleep(0.01)
        return False

    def engine(self) -> psutil.Process | None:
        """The server process of the newest engine, if alive."""
        for (pid,) in self.rows("SELECT pid FROM engines WHERE pid > 0 ORDER BY started_at DESC"):
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    return process
        return None

    def bystander(self, *command: str) -> "subprocess.Popen[bytes]":
        """A process that has nothing to do with the sidecar, and must live until the end of the run."""
        started = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        self.bystanders.append(started)
        return started

    def hook_processes(self) -> list[int]:
        """The processes that hooks have written into the run's folder, as $0/NAME.pid."""
        found: list[int] = []
        for path in self.folder.glob("*.pid"):
            with suppress(OSError, ValueError):
                found.append(int(path.read_text()))
        return found

    @contextlib.contextmanager
    def journal_changed_by_the_operator(self, *, loses: bool) -> Generator[None]:
        """The watcher of trials waits; with ``loses`` it then starts over."""
        with self._trials_lock:
            yield
            if loses:
                self.seen.trials.clear()

    def fail(self, fault: str, times: int = 1) -> None:
        """Makes engines fail; see tests/support/fake_vllm.py."""
        for number in range(times):
            (self.fake / f"{fault}.{number}").touch()

    def starts(self) -> list[dict[str, Any]]:
        """Every start of an engine."""
        path = self.fake / "starts.jsonl"
        told: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.is_file() else ():
            with suppress(ValueError):  # an engine that can't write leaves an empty line
                told.append(json.loads(line))
        return told

    def processes(self) -> list[int]:
        """The live processes of engines."""
        mark, found = str(self.fake), list[int]()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                env = process.environ()
                if env.get("FAKE_FOLDER") == mark and ENGINE_ID_VARIABLE in env:
                    found.append(process.pid)
        return found

    # The service

    def answers(self, timeout_s: float = 2.0) -> int:
        """The max_num_seqs of the engine that answers a completion on the operator's port; 0 when none does."""
        base = f"http://127.0.0.1:{self.port}"
        body = json.dumps({"model": "fake", "prompt": "a", "max_tokens": 1}).encode()
        try:
            with urllib.request.urlopen(f"{base}/v1/completions", data=body, timeout=timeout_s) as response:
                json.loads(response.read())
            with urllib.request.urlopen(f"{base}/load", timeout=timeout_s) as response:
                return int(json.loads(response.read())["max_num_seqs"])
        except (OSError, ValueError, KeyError, http.client.HTTPException):
            return 0

    def ready(self) -> bool:
        """Whether /ready answers 200."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/ready", timeout=20) as response:
                return response.status == 200
        except (OSError, ValueError, http.client.HTTPException):
            return False

    def serves(self) -> bool:
        """Whether the sidecar is running, reports serving, and an engine answers."""
        running = self.sidecar is not None and self.sidecar.poll() is None
        return running and self.last_state()[1] == "serving" and self.ready() and self.answers() > 0

    def await_serving(self, timeout_s: float) -> bool:
        """Waits until it serves, or the sidecar has ended."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.serves():
                return True
            if self.sidecar is None or self.sidecar.poll() is not None:
                return False
            time.sleep(POLL_S)
        return False

    @staticmethod
    def await_true(condition: Callable[[], bool], timeout_s: float) -> bool:
        """Whether ``condition`` becomes true in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    # The watchers

    def watch(self) -> None:
        """Starts watching for trials that end and requests that go unanswered."""
        for target in (self._watch_trials, self._watch_service):
            thread = threading.Thread(target=target, daemon=True)
            thread.start()
            self._watchers.append(thread)

    def look_at_trials(self) -> None:
        """Checks that trials already recorded have not changed or disappeared."""
        with self._trials_lock:
            self._compare_trials()

    def _compare_trials(self) -> None:
        query = "SELECT run, number, plan, started_at, ended_at, result FROM trials WHERE ended_at IS NOT NULL"
        rows = {(row[0], row[1]): row[2:] for row in self.rows(query)}
        if not rows:
            return
        for key, row in self.seen.trials.items():
            if rows.get(key) != row:
                self.seen.lost.append(f"trial {key[0]}/{key[1]} {'changed' if key in rows else 'is gone'}")
        self.seen.trials |= rows

    def _watch_trials(self) -> None:
        while not self._closing.wait(0.2):
            self.look_at_trials()

    def _watch_service(self) -> None:
        while not self._closing.wait(_WATCHED_EVERY_S):
            asked_at = time.monotonic()
            if self.answers():
                self.seen.answered_at = time.monotonic()
            else:
                # While a request is pending there is no service, even if it is answered in the end.
                self.seen.unanswered_at = max(asked_at, time.monotonic() - _WATCHED_EVERY_S)

    # The end

    def close(self, *, keep: bool = False) -> None:
        """Ends everything that is left; removes the folder unless ``keep``."""
        self._closing.set()
        for bystander in self.bystanders:
            bystander.kill()
            bystander.wait()
        for pid in self.hook_processes():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for process in self.sidecars:
            process.signal(signal.SIGCONT)
            process.signal(signal.SIGKILL)
        end_local_agents(self.folder)
        for _ in range(3):
            for pid in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for thread in self._watchers:
            thread.join(5)
        if self.settings.disk_bytes:
            if keep:
                shutil.copytree(self.state, self.folder / "state-kept", ignore=shutil.ignore_patterns("*.sock", "fill"))
            subprocess.run(["umount", "-l", str(self.state)], check=False, capture_output=True)
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)


def _started(command: list[str], output: Path, environment: Mapping[str, str]) -> Process:
    """Starts a command as a shell would."""
    root = FAKE.parents[2]
    with output.open("ab") as file:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(root), **environment},
        )
    process = Process(popen.pid)

    def wait() -> None:
        process.code = popen.wait()
        process.ended_at = time.monotonic()
        process.ended.set()

    threading.Thread(target=wait, daemon=True).start()
    return process


def _own_port() -> int:
    with _ports_lock:
        return next(port for port in _PORTS if port_free("127.0.0.1", port))


def new_folder() -> Path:
    """A folder for a run; the path is short because of the socket in it."""
    return Path(tempfile.mkdtemp(prefix="chaos-"))
