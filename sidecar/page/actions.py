"""The actions behind the page's buttons: the same calls on the private socket as `sloguard pause` and the like."""

from typing import Any, Literal

import grpc
from pydantic import BaseModel, ConfigDict, Field

from sidecar.config.schema import Config
from sidecar.record.action_queue import Door
from sidecar.service.control_rpc import DOOR_KEY
from vllm_sloguard.hooks.telemetry_client import unix_target
from vllm_sloguard.wire import control_pb2 as pb
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceStub

_TIMEOUT_S = 10.0
_CALL: dict[str, Any] = {"timeout": _TIMEOUT_S, "metadata": ((DOOR_KEY, Door.PAGE.value),)}

ActionName = Literal["retune", "pause", "resume", "abort", "rollback"]


class ActionRefused(RuntimeError):  # noqa: N818 - it names what happened
    """The sidecar refuses; the message says why, in one line."""


class Action(BaseModel):
    """The arguments; ``epoch`` is the controller that the page showed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    epoch: int = Field(ge=1, le=2**63 - 1)
    reason: str = Field(default="", max_length=200)
    promotion: int = Field(default=0, ge=0, le=2**63 - 1)


def perform(config: Config, name: ActionName, action: Action) -> str:
    """Performs the action and returns the sidecar's message. Raises ActionRefused."""
    with grpc.insecure_channel(unix_target(str(config.socket))) as channel:
        try:
            return _call(ControlServiceStub(channel), name, action)
        except grpc.RpcError as error:
            details = error.details() if isinstance(error, grpc.Call) else None
            raise ActionRefused(details or str(error)) from None


def _call(stub: ControlServiceStub, name: ActionName, action: Action) -> str:
    epoch = action.epoch
    match name:
        case "retune":
            stub.Retune(pb.RetuneRequest(epoch=epoch), **_CALL)
            return "a window is requested: vLLM drains, is tuned, and serves again"
        case "pause":
            return str(stub.Pause(pb.PauseRequest(epoch=epoch, reason=action.reason), **_CALL).summary)
        case "resume":
            return str(stub.Resume(pb.ResumeRequest(epoch=epoch), **_CALL).summary)
        case "abort":
            return str(stub.Abort(pb.AbortRequest(epoch=epoch), **_CALL).summary)
        case "rollback":
            return str(stub.Rollback(pb.RollbackRequest(epoch=epoch, promotion=action.promotion), **_CALL).summary)
