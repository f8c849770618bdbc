"""The load client's process, kept running between loads; its messages are kept until they are read."""

import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from vllm_sloguard.agent.private_files import umask_of_children
from vllm_sloguard.starts.load_protocol import GeneratorCommand, message_line

# One load reports a few MiB; what was read is dropped.
_MAX_KEPT_BYTES = 2**27
_MAX_ANSWER_BYTES = 2**22
_LONGEST_WAIT_S = 10.0


class UnknownLoadClientError(KeyError):
    """The load client has died, or was ended."""


class _Client:
    """One process; ``messages`` begin with number ``dropped``."""

    def __init__(self, python: str, log: Path, environment: Mapping[str, str]) -> None:
        self.id = uuid.uuid4().hex
        self.process = start_generator(python, log, environment)
        self._messages: list[str] = []
        self._dropped = 0
        self._kept_bytes = 0
        self._ended = False
        self._changed = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self._messages.append(line)
                self._kept_bytes += len(line)
                self._changed.notify_all()
                if self._kept_bytes > _MAX_KEPT_BYTES:  # nobody reads
                    break
        self.process.kill()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def send(self, order: GeneratorCommand) -> None:
        """Raises OSError if it has died."""
        send_command(self.process, order)

    def read(self, after: int, wait_s: float) -> tuple[list[str], bool]:
        """The messages from number ``after`` on, and whether it has ended and these are the last ones."""
        deadline = time.monotonic() + min(wait_s, _LONGEST_WAIT_S)
        with self._changed:
            self._drop(after)
            while not self._messages and not self._ended and (left_s := deadline - time.monotonic()) > 0:
                self._changed.wait(left_s)
            found: list[str] = []
            size = 0
            for line in self._messages:
                size += len(line)
                if found and size > _MAX_ANSWER_BYTES:
                    return found, False
                found.append(line)
            return found, self._ended

    def _drop(self, until: int) -> None:
        """Forgets the messages before number ``until``: they were read."""
        count = min(max(until - self._dropped, 0), len(self._messages))
        self._kept_bytes -= sum(len(line) for line in self._messages[:count])
        del self._messages[:count]
        self._dropped += count

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class LoadProcess:
    """Starts the client on first use, and again after it has died. Thread-safe."""

    def __init__(self, python: str, log: Path, environment: Mapping[str, str]) -> None:
        self._python = python
        self._log = log
        self._environment = environment
        self._client: _Client | None = None
        self._lock = threading.Lock()

    def prepare(self) -> str:
        """Starts the client if it is not running, without waiting for it; returns its id. Raises OSError."""
        with self._lock:
            if self._client is None or self._client.process.poll() is not None:
                self._client = _Client(self._python, self._log, self._environment)
            return self._client.id

    def send(self, client_id: str, order: GeneratorCommand) -> None:
        """Raises UnknownLoadClientError if that client has ended, OSError if it has just died."""
        self._of(client_id).send(order)

    def read(self, client_id: str, after: int, wait_s: float) -> tuple[list[str], bool]:
        """Its messages from number ``after`` on, and whether they are its last. Raises UnknownLoadClientError."""
        return self._of(client_id).read(after, wait_s)

    def _of(self, client_id: str) -> _Client:
        with self._lock:
            client = self._client
        if client is None or client.id != client_id:
            raise UnknownLoadClientError("that load client has ended")
        return client

    def end(self) -> None:
        """Ends the client."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.end()


def start_generator(python: str, log: Path, engines: Mapping[str, str]) -> "subprocess.Popen[str]":
    """Starts the load client without waiting for it; ``engines`` is their environment. Raises OSError."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [python, "-m", "vllm_sloguard.starts.load_generator"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            errors="replace",
            start_new_session=True,
            env=load_environment(engines),
            umask=umask_of_children(),
        )


def send_command(process: "subprocess.Popen[str]", command: GeneratorCommand) -> None:
    """Sends ``command`` to a load client. Raises OSError if it has died."""
    assert process.stdin is not None
    process.stdin.write(message_line(command) + "\n")
    process.stdin.flush()


def load_environment(engines: Mapping[str, str]) -> dict[str, str]:
    """The load client's environment: that of the engines, without the plugin, and with their API key."""
    # A fixed hash seed makes the prompts repeatable.
    own = {"VLLM_PLUGINS": "", "PYTHONHASHSEED": "0"}
    key = engines.get("VLLM_API_KEY")
    return {**engines, **own, **({"OPENAI_API_KEY": key} if key else {})}
