"""What an agent says of vLLM, of its Python environment and of a model's files. It needs no lease."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sidecar.engine.agent_client import AgentClient, AgentRefused
from vllm_sloguard.agent.environment_facts import EnvironmentFacts
from vllm_sloguard.wire import environment_pb2 as pb
from vllm_sloguard.wire.environment_pb2_grpc import EnvironmentServiceStub

# Importing vLLM, and a fork server.
_INSPECT_S = 600.0
_BUILD_S = 100.0
_FACTS: TypeAdapter[EnvironmentFacts] = TypeAdapter(EnvironmentFacts)


class AgentEnvironment:
    """The environment of one agent. ``ask`` is that of a ModelBuilder, for ``model``."""

    def __init__(self, client: AgentClient, model: str) -> None:
        self._client = client
        self._model = model

    def inspect(self, args: Mapping[str, object], *, imports: bool, forks: bool) -> EnvironmentFacts:
        """Raises AgentLost, AgentRefused."""
        request = pb.InspectEnvironmentRequest(
            model=self._model, arguments=_arguments(args), imports=imports, forks=forks
        )
        answer = self._client.call_on_channel(_inspect, request, _INSPECT_S)
        try:
            return _FACTS.validate_json(answer.facts)
        except ValidationError as error:
            raise AgentRefused(f"the agent {self._client.address} has another version: {error.errors()[0]}") from None

    def model_files(self) -> pb.DescribeModelResponse:
        """Raises AgentLost, AgentRefused."""
        return self._client.call_on_channel(_describe, pb.DescribeModelRequest(model=self._model))

    def ask(self, _folder: Path, args: Mapping[str, Any], /) -> dict[str, Any]:
        """What vLLM says of the model with ``args``, with ``error`` set if it failed."""
        try:
            request = pb.BuildModelRequest(model=self._model, arguments=_arguments(args))
            found: dict[str, Any] = json.loads(self._client.call_on_channel(_build, request, _BUILD_S).built)
        except (OSError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return found


def _arguments(args: Mapping[str, object]) -> dict[str, str]:
    """Mappings are sent as text with JSON in it, as vLLM's command line takes them."""
    return {name: json.dumps(json.dumps(value) if isinstance(value, dict) else value) for name, value in args.items()}


def _inspect(channel: Any) -> Any:
    return EnvironmentServiceStub(channel).InspectEnvironment


def _describe(channel: Any) -> Any:
    return EnvironmentServiceStub(channel).DescribeModel


def _build(channel: Any) -> Any:
    return EnvironmentServiceStub(channel).BuildModel
