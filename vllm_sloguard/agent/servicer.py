"""The agent's gRPC service: checks messages, calls the agent, and maps its errors to gRPC's."""

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import grpc

from vllm_sloguard.agent.agent import Agent
from vllm_sloguard.agent.allowed_arguments import NotAllowedError
from vllm_sloguard.agent.engine_http import Unanswered
from vllm_sloguard.agent.engine_spec import EngineLife
from vllm_sloguard.agent.fork_client import ForkServerError
from vllm_sloguard.agent.grpc_server import EPOCH_METADATA
from vllm_sloguard.agent.held_memory import held_bytes
from vllm_sloguard.agent.lease import LONGEST_LEASE_S, FencedError, LeaseExpiredError
from vllm_sloguard.agent.load_process import UnknownLoadClientError
from vllm_sloguard.agent.machine_facts import MachineFacts
from vllm_sloguard.agent.messages import (
    UnreadableMessageError,
    controller_from_wire,
    controller_to_wire,
    machine_to_wire,
    spec_from_wire,
    spec_to_wire,
    status_to_wire,
)
from vllm_sloguard.agent.plugin_relay import RelaySession
from vllm_sloguard.agent.process_group import NotGoneError
from vllm_sloguard.agent.slot import PortTakenError, SlotBusyError, UnknownEngineError
from vllm_sloguard.starts.load_protocol import End, EndLoad, RunLoad
from vllm_sloguard.wire import agent_pb2 as pb
from vllm_sloguard.wire.agent_pb2_grpc import AgentServiceServicer

_MAX_OUTPUT_BYTES = 2**21
_FOLLOW_S = 0.1
_ENGINE_ID_LENGTH = 12
_STATUS: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (FencedError, grpc.StatusCode.FAILED_PRECONDITION),
    (LeaseExpiredError, grpc.StatusCode.ABORTED),
    (UnknownEngineError, grpc.StatusCode.NOT_FOUND),
    (UnknownLoadClientError, grpc.StatusCode.NOT_FOUND),
    (NotAllowedError, grpc.StatusCode.INVALID_ARGUMENT),
    (UnreadableMessageError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotGoneError, grpc.StatusCode.INTERNAL),
    (Unanswered, grpc.StatusCode.INTERNAL),
    (OSError, grpc.StatusCode.INTERNAL),
)


class AgentServicer(AgentServiceServicer):
    """Serves one agent."""

    def __init__(self, agent: Agent, facts: MachineFacts) -> None:
        self._agent = agent
        self._facts = facts

    # Reports

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeResponse:  # noqa: N802 - gRPC's name
        agent, slot = self._agent, self._agent.slot
        controller, left_s = agent.controller
        with aborting_errors(context):
            machine = self._facts.machine(max(request.ranks, 1))
        held = held_bytes(slot.engine_pids(), machine, slot.environment) if request.held and machine else 0
        return pb.DescribeResponse(
            agent_id=agent.id,
            agent_version=self._facts.agent_version,
            vllm_version=self._facts.vllm_version() if request.versions else "",
            machine=machine and machine_to_wire(machine),
            engines=[status_to_wire(one) for one in slot.all()],
            restored=slot.restored and spec_to_wire(slot.restored),
            command=agent.setup.command,
            untunable=agent.setup.untunable,
            controller=controller and controller_to_wire(controller),
            lease_left_seconds=left_s,
            unforkable=slot.unforkable,
            held_bytes=held,
        )

    def GetEngine(self, request: pb.GetEngineRequest, context: grpc.ServicerContext) -> pb.GetEngineResponse:  # noqa: N802 - gRPC's name
        with aborting_errors(context):
            return pb.GetEngineResponse(
                engine=status_to_wire(self._agent.slot.status(request.engine_id, ports=request.ports))
            )

    def ReadOutput(self, request: pb.ReadOutputRequest, context: grpc.ServicerContext) -> pb.ReadOutputResponse:  # noqa: N802 - gRPC's name
        most = min(request.most_bytes or _MAX_OUTPUT_BYTES, _MAX_OUTPUT_BYTES)
        with aborting_errors(context):
            log = self._agent.slot.log(request.engine_id)
            total = log.stat().st_size if log.exists() else 0
            return pb.ReadOutputResponse(output=_read(log, max(total - most, 0), most), total_bytes=total)

    def Follow(self, request: pb.FollowRequest, context: grpc.ServicerContext) -> Iterator[pb.FollowResponse]:  # noqa: N802 - gRPC's name
        slot, offset = self._agent.slot, request.offset
        with aborting_errors(context):
            log = slot.log(request.engine_id)
            while context.is_active():
                status = slot.status(request.engine_id)
                if log.exists() and log.stat().st_size < offset:  # it was truncated
                    offset = 0
                while output := _read(log, offset, _MAX_OUTPUT_BYTES):
                    offset += len(output)
                    yield pb.FollowResponse(output=output, offset=offset)
                if status.life is not EngineLife.RUNNING:
                    yield pb.FollowResponse(offset=offset, ended=status_to_wire(status))
                    return
                time.sleep(_FOLLOW_S)

    # The lease

    def Acquire(self, request: pb.AcquireRequest, context: grpc.ServicerContext) -> pb.AcquireResponse:  # noqa: N802 - gRPC's name
        with aborting_errors(context):
            if not 0 < request.lease_seconds <= LONGEST_LEASE_S:
                raise UnreadableMessageError(f"lease_seconds: above 0 and at most {LONGEST_LEASE_S:.0f} is needed")
            self._agent.acquire(controller_from_wire(request.controller), request.lease_seconds)
            return pb.AcquireResponse(agent_id=self._agent.id)

    def Release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.ReleaseResponse:  # noqa: N802 - gRPC's name
        with aborting_errors(context):
            self._agent.release(controller_from_wire(request.controller))
            return pb.ReleaseResponse()

    # Engines

    def StartEngine(self, request: pb.StartEngineRequest, context: grpc.ServicerContext) -> pb.StartEngineResponse:  # noqa: N802 - gRPC's name
        with aborting_errors(context):
            _check_ids(request.engine_id, request.request_id)
            try:
                status = self._agent.start_engine(
                    controller_from_wire(request.controller),
                    request.request_id,
                    request.engine_id,
                    spec_from_wire(request.spec),
                    fork=request.fork,
                    learned=request.learned,
                )
            except PortTakenError as error:
                return _not_started(pb.START_FAILURE_KIND_PORT_TAKEN, error)
            except ForkServerError as error:
                return _not_started(pb.START_FAILURE_KIND_NOT_FORKED, error)
            except SlotBusyError as error:
                return _not_started(pb.START_FAILURE_KIND_BUSY, error)
            except OSError as error:
                return _not_started(pb.START_FAILURE_KIND_NO_PROCESS, error)
            return pb.StartEngineResponse(started=status_to_wire(status))

    def StopEngine(self, request: pb.StopEngineRequest, context: grpc.ServicerContext) -> pb.StopEngineResponse:  # noqa: N802 - gRPC's name
        with aborting_errors(context):
            _check_ids(request.engine_id, request.request_id)
            status = self._agent.stop_engine(
                controller_from_wire(request.controller), request.request_id, request.engine_id, drain=request.drain
            )
            return pb.StopEngineResponse(engine=status_to_wire(status))

    def DumpStacks(self, request: pb.DumpStacksRequest, context: grpc.ServicerContext) -> pb.DumpStacksResponse:  # noqa: N802 - gRPC's name
        with aborting_errors(context):
            _check_ids(request.engine_id, request.request_id)
            self._agent.show_stacks(controller_from_wire(request.controller), request.request_id, request.engine_id)
            return pb.DumpStacksResponse()

    def AskEngine(self, request: pb.AskEngineRequest, context: grpc.ServicerContext) -> pb.AskEngineResponse:  # noqa: N802 - gRPC's name
        with aborting_errors(context):
            controller = controller_from_wire(request.controller)
            timeout_s = request.timeout_seconds if request.timeout_seconds > 0 else 1.0
            try:
                body = self._agent.ask_engine(controller, request.engine_id, request.path, request.body, timeout_s)
            except Unanswered as error:
                return pb.AskEngineResponse(unanswered=str(error))
            return pb.AskEngineResponse(body=body)

    def PrepareForks(self, request: pb.PrepareForksRequest, context: grpc.ServicerContext) -> pb.PrepareForksResponse:  # noqa: N802 - gRPC's name
        with aborting_errors(context):
            return pb.PrepareForksResponse(
                unforkable=self._agent.prepare_forks(controller_from_wire(request.controller))
            )

    def EndForks(self, request: pb.EndForksRequest, context: grpc.ServicerContext) -> pb.EndForksResponse:  # noqa: N802 - gRPC's name
        with aborting_errors(context):
            self._agent.end_forks(controller_from_wire(request.controller))
            return pb.EndForksResponse()

    # Loads

    def PrepareLoads(self, request: pb.PrepareLoadsRequest, context: grpc.ServicerContext) -> pb.PrepareLoadsResponse:  # noqa: N802 - gRPC's name
        with aborting_errors(context):
            return pb.PrepareLoadsResponse(
                client_id=self._agent.prepare_loads(controller_from_wire(request.controller))
            )

    def SendToLoadClient(  # noqa: N802 - gRPC's name
        self, request: pb.SendToLoadClientRequest, context: grpc.ServicerContext
    ) -> pb.SendToLoadClientResponse:
        with aborting_errors(context):
            _check_ids("0" * _ENGINE_ID_LENGTH, request.request_id)
            controller = controller_from_wire(request.controller)
            if request.HasField("run"):
                run = request.run
                order = RunLoad(tuple(run.argv), run.request_timeout_seconds, run.warmup_requests)
                self._agent.run_load(controller, request.request_id, request.client_id, run.engine_id, order)
            elif request.HasField("end") and request.end.how in list(End):
                end = EndLoad(End(request.end.how))
                self._agent.end_load(controller, request.request_id, request.client_id, end)
            else:
                raise UnreadableMessageError(f"order: a load, or its end ({' or '.join(End)}), is needed")
            return pb.SendToLoadClientResponse()

    def ReadLoadClient(  # noqa: N802 - gRPC's name
        self, request: pb.ReadLoadClientRequest, context: grpc.ServicerContext
    ) -> pb.ReadLoadClientResponse:
        with aborting_errors(context):
            messages, ended = self._agent.read_loads(request.client_id, request.after, max(request.wait_seconds, 0.0))
            return pb.ReadLoadClientResponse(messages=messages, ended=ended)

    def EndLoads(self, request: pb.EndLoadsRequest, context: grpc.ServicerContext) -> pb.EndLoadsResponse:  # noqa: N802 - gRPC's name
        with aborting_errors(context):
            self._agent.end_loads(controller_from_wire(request.controller))
            return pb.EndLoadsResponse()

    # The plugins' calls

    def Relay(  # noqa: N802 - gRPC's name
        self, request_iterator: Iterator[pb.RelayRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.RelayResponse]:
        with aborting_errors(context):
            first = next(iter(request_iterator), pb.RelayRequest())
            session = self._agent.open_relay(controller_from_wire(first.controller))
        context.add_callback(session.end)
        threading.Thread(target=_deliver, args=(request_iterator, session), daemon=True).start()
        for call in session.calls():
            yield pb.RelayResponse(
                call=call.number, method=call.method, request=call.request, timeout_seconds=call.timeout_s
            )


def _deliver(answers: Iterator[pb.RelayRequest], session: RelaySession) -> None:
    with suppress(grpc.RpcError):  # the stream has ended
        for answer in answers:
            session.answered(answer.call, answer.answer, answer.error_code, answer.error)
    session.end()


def _read(log: Any, offset: int, most: int) -> bytes:
    try:
        with log.open("rb") as file:
            file.seek(offset)
            return file.read(most)
    except FileNotFoundError:
        return b""


def _check_ids(engine_id: str, request_id: str) -> None:
    """Raises UnreadableMessageError."""
    if len(engine_id) != _ENGINE_ID_LENGTH or not set(engine_id) <= set("0123456789abcdef"):
        raise UnreadableMessageError(f"engine_id: {engine_id[:80]!r}: 12 hexadecimal digits are needed")
    if not 0 < len(request_id) <= 64:
        raise UnreadableMessageError("request_id: 1 to 64 characters are needed")


def _not_started(kind: pb.StartFailureKind, error: Exception) -> pb.StartEngineResponse:
    return pb.StartEngineResponse(failure=pb.StartFailure(kind=kind, reason=str(error)))


@contextmanager
def aborting_errors(context: grpc.ServicerContext) -> Generator[None]:
    """Ends the call with gRPC's status for an error of the agent."""
    try:
        yield
    except tuple(kind for kind, _ in _STATUS) as error:
        _abort(context, error)


def _abort(context: grpc.ServicerContext, error: Exception) -> NoReturn:
    if isinstance(error, FencedError):
        context.set_trailing_metadata(((EPOCH_METADATA, str(error.epoch)),))
    code = next(code for kind, code in _STATUS if isinstance(error, kind))
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    context.abort(code, " ".join(text.split())[:1000])
    raise AssertionError("abort raises")
