"""`sloguard-agent` as a process on the fake engine."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.agent.process_identity import Identity

AGENT = [sys.executable, "-m", "vllm_sloguard.agent"]
FAKE = Path(__file__).resolve().parent / "fake_vllm.py"
_PATIENCE_S = 60.0


class AgentProcess:
    """One agent, or one after the other, on one state folder."""

    def __init__(self, folder: Path, *options: str, command: tuple[str, ...] = (), **environment: str) -> None:
        self.state = folder / "agent"
        self.socket = self.state / "agent.sock"
        self.options = ("--state", str(self.state), "--python", str(FAKE), *options)
        self.command = command
        self.environment = environment
        self.log = folder / "agent.log"
        self.output = folder / "agent.out"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"unix://{self.socket}"

    def start(self, *, wait: bool = True) -> "AgentProcess":
        before = self._times_listening()
        with self.log.open("ab") as errors, self.output.open("ab") as output:
            words = [*AGENT, *self.options, *(["--", *self.command] if self.command else [])]
            environment = {**os.environ, **self.environment}
            self.process = subprocess.Popen(words, stdout=output, stderr=errors, env=environment)
        if wait:
            self.wait_until(lambda: self._times_listening() > before or self.process_ended(), "listening")
            assert not self.process_ended(), self.log.read_text()
        return self

    def _times_listening(self) -> int:
        return self.log.read_text().count("listening on") if self.log.exists() else 0

    def process_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def wait_until(self, holds: Callable[[], object], what: str, within_s: float = _PATIENCE_S) -> None:
        deadline = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}; {self.log.read_text()[-2000:]}"
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code after a signal."""
        self.send(number)
        assert self.process is not None
        return self.process.wait(_PATIENCE_S)

    def engine_ids(self) -> set[str]:
        """All engines that it or an earlier agent has started."""
        return {log.stem.removeprefix("engine-") for log in (self.state / "logs").glob("engine-*.log")}

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def engine_pids(self) -> list[int]:
        """All processes of its engines."""
        groups = [ProcessGroup(Identity(-1, 0.0, engine_id)) for engine_id in self.engine_ids()]
        return [member.pid for group in groups for member in group.members()]

    def clean_up(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for engine_id in self.engine_ids():
            ProcessGroup(Identity(-1, 0.0, engine_id)).kill()


@contextmanager
def agent_process(
    folder: Path, *options: str, command: tuple[str, ...] = (), **environment: str
) -> Generator[AgentProcess]:
    """An agent; all its processes are ended afterwards."""
    agent = AgentProcess(folder, *options, command=command, **environment)
    try:
        yield agent.start()
    finally:
        agent.clean_up()


def fake_command(port: int, *, max_num_seqs: int = 8, drain_timeout_s: int = 0) -> tuple[str, ...]:
    """The command line of a service on the fake engine."""
    words = [str(FAKE), "-m", "vllm.entrypoints.openai.api_server", "--model", "fake"]
    words += ["--max-num-seqs", str(max_num_seqs), "--host", "127.0.0.1", "--port", str(port)]
    return (*words, "--shutdown-timeout", str(drain_timeout_s))


def served_seqs(port: int) -> int:
    """max_num_seqs of the engine on ``port``; 0 without an answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/load", timeout=5) as answer:
            return int(json.loads(answer.read())["max_num_seqs"])
    except (OSError, HTTPException):
        return 0
