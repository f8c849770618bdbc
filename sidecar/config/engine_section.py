"""The section ``engine`` of the configuration file."""

import sys
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveFloat, model_validator

from sidecar.config.engine_arguments import ArgsField, check_arguments
from sidecar.config.window import Section
from vllm_sloguard.agent.listen import AddressError, read_address


def _agent_address(text: str) -> str:
    try:
        read_address(text)
    except AddressError as error:
        raise ValueError(str(error)) from None
    return text


AgentAddressField = Annotated[str, AfterValidator(_agent_address)]


class AgentTls(Section):
    """This sidecar's certificate and key, and the authority that signs the agent's certificate; all are files."""

    certificate: Path = Field(strict=False)
    key: Path = Field(strict=False)
    ca: Path = Field(strict=False)


class EngineConfig(Section):
    """How vLLM is started; ``args`` is the incumbent.

    ``agents`` names the agent that runs the engines: "unix:///path", or "host:port" with ``agent_tls``; without one,
    the sidecar runs them itself. ``python`` and ``env`` are then the agent's own.
    """

    args: ArgsField = Field(default={})
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    python: str = sys.executable
    env: dict[str, str] = Field(default={})
    start_timeout_s: PositiveFloat = 900.0
    # Whether trials may run on engines forked from a process that has already imported vLLM.
    forked_trials: bool = True
    # Whether a trial may reuse the previous trial's engine if a live change is enough.
    live_trials: bool = True
    # Whether the serving engine is forked too, so that it is back within seconds after a window, a crash or a kill.
    forked_serving: bool = False
    # Whether engines keep Triton's kernels in the state folder: otherwise torch.compile recompiles them for each
    # configuration, about 15 s per start.
    keep_kernels: bool = True
    drain_timeout_s: Annotated[int, Field(ge=0)] = 30
    # An engine without a token or a step for this long is considered hung, and restarted.
    hang_timeout_s: Annotated[float, Field(ge=2)] = 15.0
    agents: list[AgentAddressField] = Field(default=[])
    agent_tls: AgentTls | None = None

    @model_validator(mode="after")
    def _agents_alone(self) -> "EngineConfig":
        if len(self.agents) > 1:
            raise ValueError(f"agents: one agent is supported, got {len(self.agents)}")
        if not self.agents and self.agent_tls is not None:
            raise ValueError("agent_tls: only with agents")
        if self.agents and not self.agents[0].startswith("unix://") and self.agent_tls is None:
            raise ValueError("agents: an address over TCP needs agent_tls: certificate, key and ca")
        for name in ("env", "python"):
            if self.agents and name in self.model_fields_set:
                raise ValueError(f"{name}: set it where the agent is started; with agents it is not used here")
        return self

    @model_validator(mode="after")
    def _no_own_args(self) -> "EngineConfig":
        check_arguments(self.args)
        return self
