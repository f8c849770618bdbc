"""Imports the environment's service with its first call: its imports would double the CPU time of an agent's start."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from vllm_sloguard.wire.environment_pb2_grpc import EnvironmentServiceServicer

if TYPE_CHECKING:
    import grpc

    from vllm_sloguard.agent.agent import Agent
    from vllm_sloguard.agent.environment_servicer import EnvironmentServicer
    from vllm_sloguard.wire import environment_pb2 as pb


class EnvironmentOnDemand(EnvironmentServiceServicer):
    """As EnvironmentServicer."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    @cached_property
    def _servicer(self) -> EnvironmentServicer:
        from vllm_sloguard.agent.environment_servicer import EnvironmentServicer

        return EnvironmentServicer(self._agent)

    def InspectEnvironment(  # noqa: N802 - gRPC's name
        self, request: pb.InspectEnvironmentRequest, context: grpc.ServicerContext
    ) -> pb.InspectEnvironmentResponse:
        return self._servicer.InspectEnvironment(request, context)

    def DescribeModel(  # noqa: N802 - gRPC's name
        self, request: pb.DescribeModelRequest, context: grpc.ServicerContext
    ) -> pb.DescribeModelResponse:
        return self._servicer.DescribeModel(request, context)

    def BuildModel(self, request: pb.BuildModelRequest, context: grpc.ServicerContext) -> pb.BuildModelResponse:  # noqa: N802 - gRPC's name
        return self._servicer.BuildModel(request, context)
