"""The gRPC service that reports what vLLM, its Python environment and its files say. Read-only: it needs no lease."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc

from vllm_sloguard.agent.agent import Agent
from vllm_sloguard.agent.build_helper import BuildHelper
from vllm_sloguard.agent.environment_probe import ProbeRequest, probe_environment
from vllm_sloguard.agent.messages import argument_from_wire
from vllm_sloguard.agent.servicer import aborting_errors
from vllm_sloguard.guard.bounded_read import read_small_file
from vllm_sloguard.guard.checkpoint import checkpoint_bytes
from vllm_sloguard.guard.known_model import local_folder, structural
from vllm_sloguard.wire import environment_pb2 as pb
from vllm_sloguard.wire.environment_pb2_grpc import EnvironmentServiceServicer

MODEL_FILES = ("config.json", "hf_quant_config.json")


class EnvironmentServicer(EnvironmentServiceServicer):
    """Serves one agent's environment."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._helper = BuildHelper(agent.setup.python)

    def InspectEnvironment(  # noqa: N802 - gRPC's name
        self, request: pb.InspectEnvironmentRequest, context: grpc.ServicerContext
    ) -> pb.InspectEnvironmentResponse:
        slot, python = self._agent.slot, self._agent.setup.python
        with aborting_errors(context):
            args = _arguments(request.arguments)
            if request.model:
                self._agent.setup.allowed.check_model(request.model)
            probe = ProbeRequest(request.model, args, request.imports, request.forks)
            found = probe_environment(probe, python, slot.environment, slot.engine_pids(), lambda _: None)
            return pb.InspectEnvironmentResponse(facts=json.dumps(asdict(found)))

    def DescribeModel(  # noqa: N802 - gRPC's name
        self, request: pb.DescribeModelRequest, context: grpc.ServicerContext
    ) -> pb.DescribeModelResponse:
        with aborting_errors(context):
            self._agent.setup.allowed.check_model(request.model)
            folder = local_folder(request.model)
            if folder is None:
                problem = f"no config.json of {request.model} on the agent's machine"
                return pb.DescribeModelResponse(problem=problem)
            size = checkpoint_bytes(folder)
            if not folder.is_dir():
                return pb.DescribeModelResponse(checkpoint_bytes=size, problem="a GGUF file has no config.json")
            return pb.DescribeModelResponse(files=_model_files(folder), checkpoint_bytes=size)

    def BuildModel(self, request: pb.BuildModelRequest, context: grpc.ServicerContext) -> pb.BuildModelResponse:  # noqa: N802 - gRPC's name
        with aborting_errors(context):
            args = _arguments(request.arguments)
            # Building a model may run its code: the same rules as for starting it.
            self._agent.setup.allowed.check(request.model, "127.0.0.1", args)
            folder = local_folder(request.model)
            built: dict[str, Any] = (
                {"error": "no config.json"} if folder is None else self._helper.ask(folder, structural(args))
            )
            return pb.BuildModelResponse(built=json.dumps(built))


def _arguments(arguments: Mapping[str, str]) -> dict[str, bool | int | float | str | list[str]]:
    """Raises UnreadableMessageError."""
    return {name: argument_from_wire(name, text) for name, text in sorted(arguments.items())}


def _model_files(folder: Path) -> dict[str, bytes]:
    """Raises OSError."""
    return {name: read_small_file(folder / name) for name in MODEL_FILES if (folder / name).exists()}
