"""The agent's messages on the wire, and the values that they carry."""

import json
from typing import cast

from vllm_sloguard.agent.engine_spec import EngineLife, EngineRole, EngineSpec, EngineStatus
from vllm_sloguard.agent.lease import ControllerId
from vllm_sloguard.agent.process_identity import Identity
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.wire import agent_pb2 as pb

_ROLES = {EngineRole.TRIAL: pb.ENGINE_ROLE_TRIAL, EngineRole.SERVING: pb.ENGINE_ROLE_SERVING}
_LIVES = {
    EngineLife.RUNNING: pb.ENGINE_LIFE_RUNNING,
    EngineLife.EXITED: pb.ENGINE_LIFE_EXITED,
    EngineLife.STOPPED: pb.ENGINE_LIFE_STOPPED,
    EngineLife.EXPIRED: pb.ENGINE_LIFE_EXPIRED,
    EngineLife.LOST: pb.ENGINE_LIFE_LOST,
}
_ROLE_OF = {number: role for role, number in _ROLES.items()}
_LIFE_OF = {number: life for life, number in _LIVES.items()}


class UnreadableMessageError(ValueError):
    """A message that can't be used; the text names the field."""


def controller_to_wire(controller: ControllerId) -> pb.Controller:
    """A controller."""
    return pb.Controller(journal_id=controller.journal_id, epoch=controller.epoch)


def controller_from_wire(message: pb.Controller) -> ControllerId:
    """Raises UnreadableMessageError."""
    if not 0 < len(message.journal_id) <= 64 or message.epoch == 0:
        raise UnreadableMessageError("controller: a journal_id of 1 to 64 characters and an epoch from 1 up are needed")
    return ControllerId(message.journal_id, message.epoch)


def spec_to_wire(spec: EngineSpec) -> pb.EngineSpec:
    """Without the exact command line, which stays with the agent."""
    return pb.EngineSpec(
        model=spec.model,
        arguments={name: json.dumps(value) for name, value in spec.args.items()},
        host=spec.host,
        port=spec.port,
        role=_ROLES[spec.role],
        drain_timeout_seconds=spec.drain_timeout_s,
        repair=spec.repair,
        longest_request_tokens=spec.longest_request_tokens,
    )


def spec_from_wire(message: pb.EngineSpec) -> EngineSpec:
    """Raises UnreadableMessageError."""
    if message.role not in _ROLE_OF:
        raise UnreadableMessageError("spec.role: ENGINE_ROLE_TRIAL or ENGINE_ROLE_SERVING is needed")
    if message.port > 65535:
        raise UnreadableMessageError(f"spec.port: {message.port} is not a port")
    args = {name: argument_from_wire(name, text) for name, text in sorted(message.arguments.items())}
    return EngineSpec(
        message.model,
        args,
        message.host,
        message.port,
        _ROLE_OF[message.role],
        message.drain_timeout_seconds,
        message.repair,
        message.longest_request_tokens,
    )


def argument_from_wire(name: str, text: str) -> bool | int | float | str | list[str]:
    """The value of an argument. Raises UnreadableMessageError."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not name.isidentifier():
        raise UnreadableMessageError(f"spec.arguments: {name[:80]!r} is not the name of an argument")
    if isinstance(value, bool | int | float | str):
        return value
    texts = cast("list[object]", value) if isinstance(value, list) else [None]
    if texts and all(isinstance(word, str) for word in texts):
        return cast("list[str]", texts)
    raise UnreadableMessageError(f"spec.arguments: {name}: {text[:80]!r} is not a value or a list of texts in JSON")


def status_to_wire(status: EngineStatus) -> pb.EngineState:
    """One engine."""
    return pb.EngineState(
        engine_id=status.engine_id,
        spec=spec_to_wire(status.spec),
        pid=status.identity.pid,
        started_at=status.identity.started_at,
        life=_LIVES[status.life],
        exit_code=status.exit_code,
        foreign_on_port=status.foreign_on_port,
        owns_port=status.owns_port,
        forked=status.forked,
        by_agent=status.by_agent,
    )


def status_from_wire(message: pb.EngineState, boot: str) -> EngineStatus:
    """One engine, its identity marked with ``boot`` instead of a boot id. Raises UnreadableMessageError."""
    if message.life not in _LIFE_OF:
        raise UnreadableMessageError("life: unknown")
    return EngineStatus(
        message.engine_id,
        spec_from_wire(message.spec),
        Identity(message.pid, message.started_at, message.engine_id, boot),
        _LIFE_OF[message.life],
        message.exit_code if message.HasField("exit_code") else None,
        message.foreign_on_port,
        message.owns_port,
        message.forked,
        message.by_agent,
    )


def machine_to_wire(found: Machine) -> pb.MachineFacts:
    """The machine's memory."""
    return pb.MachineFacts(
        kind=found.kind,
        total_bytes=found.total_bytes,
        free_bytes=found.free_bytes,
        gpus=found.gpus,
        source=found.source,
    )


def machine_from_wire(message: pb.MachineFacts) -> Machine:
    """Raises UnreadableMessageError."""
    if message.kind not in ("cuda", "cpu"):
        raise UnreadableMessageError(f"machine.kind: {message.kind[:80]!r} is neither cuda nor cpu")
    kind = "cuda" if message.kind == "cuda" else "cpu"
    return Machine(kind, message.total_bytes, message.free_bytes, message.gpus, message.source)
