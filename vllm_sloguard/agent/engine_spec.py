"""What an engine of the agent runs, and what has become of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from vllm_sloguard.agent.process_identity import Identity
from vllm_sloguard.agent.serve_command import Args


class EngineRole(StrEnum):
    """What an engine is for."""

    TRIAL = "trial"  # ends with the lease
    SERVING = "serving"  # outlives the lease, and the agent


class EngineLife(StrEnum):
    """What has become of an engine."""

    RUNNING = "running"
    EXITED = "exited"  # by itself, or killed by something other than the agent
    STOPPED = "stopped"  # by a request
    EXPIRED = "expired"  # ended by the agent, because its lease had expired or another controller took over
    LOST = "lost"  # ended with the agent, or while no agent ran


@dataclass(frozen=True)
class EngineSpec:
    """An engine's configuration. ``command`` is the exact command line instead, if the agent was given one."""

    model: str
    args: Args
    host: str
    port: int
    role: EngineRole
    drain_timeout_s: int = 0
    repair: bool = False
    longest_request_tokens: int = 0
    command: tuple[str, ...] = ()

    @property
    def all_args(self) -> Args:
        """All arguments of the command line; without a host, vLLM listens on all interfaces."""
        host = {"host": self.host} if self.host else {}
        return {**self.args, **host, "port": self.port, "shutdown_timeout": self.drain_timeout_s}


@dataclass(frozen=True)
class EngineStatus:
    """One engine; ``exit_code`` is None while it runs, and if it is unknown.

    ``by_agent``: the agent started it by itself, not for a sidecar.
    """

    engine_id: str
    spec: EngineSpec
    identity: Identity
    life: EngineLife
    exit_code: int | None = None
    foreign_on_port: bool = False
    owns_port: bool = False
    forked: bool = False
    by_agent: bool = False


@dataclass(frozen=True)
class SavedEngine:
    """An engine in the agent's state file. ``detached``: it outlives the agent. ``by_agent`` as in EngineStatus."""

    spec: EngineSpec
    identity: Identity
    detached: bool
    by_agent: bool = False


@dataclass(frozen=True)
class SavedState:
    """The agent's state file: what a killed agent's successor needs."""

    engines: Mapping[str, SavedEngine] = field(default_factory=dict[str, SavedEngine])
    restored: EngineSpec | None = None
    journal_id: str = ""
    epoch: int = 0
    lease_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "SavedState":
        """Raises KeyError, TypeError or ValueError for anything else."""
        engines = {
            engine_id: SavedEngine(
                _spec(saved["spec"]),
                Identity(**saved["identity"]),
                bool(saved["detached"]),
                bool(saved.get("by_agent", False)),
            )
            for engine_id, saved in content["engines"].items()
        }
        restored = content["restored"] and _spec(content["restored"])
        return cls(engines, restored, str(content["journal_id"]), int(content["epoch"]), float(content["lease_s"]))


def _spec(content: Mapping[str, Any]) -> EngineSpec:
    fields: dict[str, Any] = {**content, "role": EngineRole(content["role"]), "command": tuple(content["command"])}
    return EngineSpec(**fields)
