"""What the page's buttons ask: the calls of the private socket, by the same door as `sloguard pause` and the others."""

from typing import Any, Literal

import grpc
from pydantic import BaseModel, ConfigDict, Field

from sidecar.config.schema import Config
from vllm_sloguard.hooks.telemetry_client import unix_target
from vllm_sloguard.wire import control_pb2 as pb
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceStub

_DEADLINE_S = 10.0

Name = Literal["pause", "resume", "abort", "rollback"]


class ActionRefused(RuntimeError):  # noqa: N818 - it names what happened
    """The sidecar does not do it; the text says why, in one line."""


class Order(BaseModel):
    """Whom it is for: the controller of ``epoch``, as the page has shown it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    epoch: int = Field(ge=1, le=2**63 - 1)
    reason: str = Field(default="", max_length=200)
    promotion: int = Field(default=0, ge=0, le=2**63 - 1)


def give(config: Config, name: Name, order: Order) -> str:
    """Gives the order, and returns what the sidecar answers. Raises ActionRefused."""
    with grpc.insecure_channel(unix_target(str(config.socket))) as channel:
        try:
            return str(_call(ControlServiceStub(channel), name, order).summary)
        except grpc.RpcError as error:
            details = error.details() if isinstance(error, grpc.Call) else None
            raise ActionRefused(details or str(error)) from None


def _call(stub: ControlServiceStub, name: Name, order: Order) -> Any:
    epoch = order.epoch
    match name:
        case "pause":
            return stub.Pause(pb.PauseRequest(epoch=epoch, reason=order.reason), timeout=_DEADLINE_S)
        case "resume":
            return stub.Resume(pb.ResumeRequest(epoch=epoch), timeout=_DEADLINE_S)
        case "abort":
            return stub.Abort(pb.AbortRequest(epoch=epoch), timeout=_DEADLINE_S)
        case "rollback":
            return stub.Rollback(pb.RollbackRequest(epoch=epoch, promotion=order.promotion), timeout=_DEADLINE_S)
