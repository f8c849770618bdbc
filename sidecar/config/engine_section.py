"""The section ``engine`` of the configuration file."""

import sys
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveFloat, model_validator

from sidecar.config.engine_arguments import ArgsField, check_arguments
from sidecar.config.window import Section
from vllm_sloguard.agent.lease import LONGEST_LEASE_S
from vllm_sloguard.agent.listen import AddressError, read_address

# In place of an address: the sidecar starts an agent by itself.
LOCAL_AGENT = "local"


def _agent_address(text: str) -> str:
    if text == LOCAL_AGENT:
        return text
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

    ``agents`` names the agent that runs the engines: "local" for one that the sidecar starts by itself,
    "unix:///path", or "host:port" with ``agent_tls``; without one, the sidecar runs them itself. Where
    the agent is not a local one, ``python`` and ``env`` are its own. With ``watch_only``, vLLM at ``host`` and ``port``
    was started by someone else, with the plugin: the sidecar reports on it and never tunes.
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
    watch_only: bool = False
    # The agent ends trials and restores the service when it has not heard from the sidecar for this long.
    agent_lease_s: Annotated[float, Field(ge=1, le=LONGEST_LEASE_S)] = 10.0

    @model_validator(mode="after")
    def _agents_alone(self) -> "EngineConfig":
        if len(self.agents) > 1:
            raise ValueError(f"agents: one agent is supported, got {len(self.agents)}")
        remote = self.agent_address
        # By value: a configuration that was recorded in a journal has every field.
        if not self.agents and self.agent_lease_s != type(self).model_fields["agent_lease_s"].default:
            raise ValueError("agent_lease_s: only with agents")
        if not remote and self.agent_tls is not None:
            raise ValueError("agent_tls: only with the address of an agent in agents")
        if remote and not remote.startswith("unix://") and self.agent_tls is None:
            raise ValueError("agents: an address over TCP needs agent_tls: certificate, key and ca")
        if remote and self.watch_only:
            raise ValueError("watch_only: not with agents, which can tune")
        for name in ("env", "python"):
            if remote and name in self.model_fields_set:
                raise ValueError(f"{name}: set it where the agent is started; with agents it is not used here")
        return self

    @property
    def local_agent(self) -> bool:
        """Whether the sidecar starts the agent by itself."""
        return self.agents == [LOCAL_AGENT]

    @property
    def agent_address(self) -> str:
        """The address of an agent that was started by someone else; empty without one."""
        return "" if self.local_agent else next(iter(self.agents), "")

    @model_validator(mode="after")
    def _no_own_args(self) -> "EngineConfig":
        check_arguments(self.args)
        return self
