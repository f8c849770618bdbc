"""The agent that a sidecar starts by itself on this machine, in its state folder.

It outlives a sidecar that is killed, and the next one takes it over; otherwise it ends with the sidecar, and a serving
engine that was left running is adopted by the next agent. One that dies is started again.
"""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from sidecar.config.schema import Config
from sidecar.format import Say
from vllm_sloguard.agent.private_files import umask_of_children
from vllm_sloguard.agent.state_file import AgentFolder

_FOLDER = "agent"
# In the state folder, and shared with the agent: engines log and keep kernels there, also those without an agent.
_LOGS, _KERNELS = "logs", "kernels"
# Variables that engines read: with others, an agent that runs already is replaced.
_AFFECT_VLLM = ("CUDA_", "HF_", "NCCL_", "TORCH", "TRITON_", "VLLM_")
_LISTENS_WITHIN_S = 60.0
_ENDS_WITHIN_S = 15.0
_POLL_S = 0.02
_CHECK_EVERY_S = 0.5
_LONGEST_BACKOFF_S = 30.0


class LocalAgentError(OSError):
    """The local agent does not start; the text says why."""


class LocalAgent:
    """The agent of one state folder, whose lock this sidecar holds."""

    def __init__(self, config: Config, say: Say) -> None:
        self._config = config
        self._say = say
        self._folder = AgentFolder(config.state / _FOLDER)
        self._socket = self._folder.path / "a.sock"  # no longer than sidecar.sock: a socket's path is limited
        self._started_as = self._folder.path / "started.json"
        self._log = config.state / _LOGS / "agent.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="sloguard-agent", daemon=True)

    @property
    def address(self) -> str:
        """Its socket, as an address of engine.agents."""
        return f"unix://{self._socket}"

    def start(self) -> None:
        """Starts it, or takes over one that an earlier sidecar has started in the same way. Raises LocalAgentError."""
        self._folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (_LOGS, _KERNELS):
            if not (self._folder.path / name).exists():
                (self._config.state / name).mkdir(mode=0o700, exist_ok=True)
                (self._folder.path / name).symlink_to(Path("..") / name)
        running = self._pid()
        if running is None or self._read_started_as() != self._digest():
            if running is not None:
                self._end(running)
            self._launch()
        self._keeper.start()

    def close(self) -> None:
        """Ends it; the serving engine, if one is left, keeps running."""
        self._ended.set()
        self._keeper.join()
        if (pid := self._pid()) is not None:
            self._end(pid)
        saved = self._folder.load()
        if not saved.engines:  # the service was stopped on purpose: no agent must restore it
            (self._folder.path / "agent.json").unlink(missing_ok=True)

    def _keep(self) -> None:
        backoff_s = _CHECK_EVERY_S
        while not self._ended.wait(backoff_s):
            if self._pid() is not None:
                backoff_s = _CHECK_EVERY_S
                continue
            self._say("the local agent has ended, and is started again")
            try:
                self._launch()
            except LocalAgentError as error:
                backoff_s = min(backoff_s * 2, _LONGEST_BACKOFF_S)
                self._say(str(error))

    def _command(self) -> list[str]:
        engine = self._config.engine
        names = {*engine.args, *(name for args in self._config.search.unguarded for name in args)}
        line = [sys.executable, "-m", "vllm_sloguard.agent", "--state", str(self._folder.path)]
        line += ["--listen", self.address, *([] if engine.keep_kernels else ["--no-kernels"])]
        line += ["--python", engine.python, "--model", self._config.model, "--host", engine.host]
        return [*line, "--trust-names", "--allow", ",".join(sorted(names))]

    def _digest(self) -> str:
        """Identifies how it is started; an environment may hold secrets."""
        environment = {name: text for name, text in os.environ.items() if name.startswith(_AFFECT_VLLM)}
        environment |= self._config.engine.env
        content = json.dumps([self._command(), sorted(environment.items())])
        return hashlib.sha256(content.encode()).hexdigest()

    def _read_started_as(self) -> str:
        with suppress(OSError):
            return self._started_as.read_text(encoding="ascii")
        return ""

    def _launch(self) -> None:
        """Raises LocalAgentError."""
        self._socket.unlink(missing_ok=True)
        self._reap()
        with suppress(OSError):  # on a full disk, the next sidecar replaces the agent
            self._started_as.write_text(self._digest(), encoding="ascii")
        try:
            with self._log.open("ab") as log:
                began = log.tell()
                self._process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={**os.environ, **self._config.engine.env},
                    umask=umask_of_children(),
                )
        except OSError as error:
            raise LocalAgentError(f"the local agent does not start: {error}") from None
        deadline = time.monotonic() + _LISTENS_WITHIN_S
        while not self._socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self._log.read_bytes()[began:].decode(errors="replace").strip().rpartition("\n")[2]
                raise LocalAgentError(f"the local agent does not start: {said or 'it does not listen'}")
            time.sleep(_POLL_S)

    def _pid(self) -> int | None:
        """Its process; None if none runs. The lock in its folder proves it."""
        self._reap()
        try:
            descriptor = os.open(self._folder.path / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            return int(text) if text.isdecimal() else None
        finally:
            os.close(descriptor)
        starting = self._process is not None and self._process.poll() is None
        return self._process.pid if starting and self._process is not None else None

    def _reap(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            self._process = None

    def _end(self, pid: int) -> None:
        for number, wait_s in ((signal.SIGTERM, _ENDS_WITHIN_S), (signal.SIGKILL, _ENDS_WITHIN_S)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + wait_s
            while self._pid() == pid and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            if self._pid() != pid:
                return
