"""The agent's folder: its lock, its state file, engine logs and sockets."""

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path

from vllm_sloguard.agent.engine_spec import SavedState
from vllm_sloguard.agent.process_identity import log_of


class AgentFolderError(RuntimeError):
    """The folder can't be used; the text says why."""


@dataclass(frozen=True)
class AgentFolder:
    """Paths in it."""

    path: Path

    @property
    def plugin_socket(self) -> Path:
        """Where the plugins of its engines report; a short name, since the path of a socket is limited."""
        return self.path / "p.sock"

    @property
    def learned(self) -> Path:
        """Measurements of earlier starts, for the plugin's repair."""
        return self.path / "learned.json"

    @property
    def kernels(self) -> Path:
        """Triton's kernels."""
        return self.path / "kernels"

    def log(self, engine_id: str) -> Path:
        """The output of an engine."""
        return log_of(self.path / "logs", engine_id)

    def other_log(self, name: str) -> Path:
        """The output of another process."""
        return self.path / "logs" / f"{name}.log"

    def create(self) -> None:
        """Creates it, for its owner only. Raises AgentFolderError."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.path / "logs").mkdir(mode=0o700, exist_ok=True)
            facts = self.path.stat()
        except OSError as error:
            raise AgentFolderError(f"{self.path}: {error.strerror}; choose another with --state") from None
        if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            raise AgentFolderError(f"{self.path} is writable by others, or owned by another user; chmod 700 it")

    def lock(self) -> int:
        """Locks it for the life of this process; returns the descriptor to keep. Raises AgentFolderError."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            raise AgentFolderError(
                f"{self.path} belongs to a running agent (process {holder}); choose another with --state"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        return descriptor

    def load(self) -> SavedState:
        """The state that an earlier agent saved; the empty one if there is none that can be read."""
        try:
            return SavedState.from_json(json.loads((self.path / "agent.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return SavedState()

    def save(self, state: SavedState) -> None:
        """Replaces the state file. Raises OSError."""
        new = self.path / "agent.json.new"
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            # Not synced to disk: it must survive a kill of the agent, but after a power cut no engine is left.
            json.dump(state.to_json(), file)
        new.replace(self.path / "agent.json")
