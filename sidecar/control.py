"""What others ask of a running sidecar: signals, and the control service on its private socket."""

import threading
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import grpc

from sidecar.config import Config
from sidecar.config_window import LONGEST_S
from sidecar.journal import Journal, JournalError, Superseded
from sidecar.opening import refusal
from sidecar.operations import Kind, Operations
from sidecar.probation import rate
from sidecar.states import IN_A_WINDOW, State
from sidecar.telemetry import TelemetryHub
from sidecar.traffic import RATE_OVER_S, real_requests
from vllm_sloguard.wire import control_pb2 as pb
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceServicer

_LONGEST_REASON = 200


@dataclass
class Requests:
    """What other threads ask of the loop, and what they need to know of it."""

    stop_sidecar: threading.Event = field(default_factory=threading.Event)
    stop_engine: threading.Event = field(default_factory=threading.Event)
    retune: threading.Event = field(default_factory=threading.Event)
    abort: threading.Event = field(default_factory=threading.Event)
    retune_duration_s: float = 0.0
    state: State = State.HALTED
    engine_id: str = ""
    epoch: int = 0


def serving_rate(hub: TelemetryHub, engine_id: str) -> float | None:
    """Requests/s of the last five minutes; None where they were not watched for a minute."""
    traffic = hub.traffic(engine_id)
    if traffic is None:
        return None
    return rate(real_requests(traffic), traffic.since, time.monotonic(), RATE_OVER_S)


class Control(ControlServiceServicer):
    """Answers at once, from threads of its own: it writes the journal, or leaves a request for the loop."""

    def __init__(self, config: Config, requests: Requests, hub: TelemetryHub) -> None:
        self._config = config
        self._requests = requests
        self._hub = hub

    def Retune(self, request: pb.RetuneRequest, context: grpc.ServicerContext) -> pb.RetuneResponse:  # noqa: N802
        """Asks the loop for a window."""
        asked = self._requests
        with self._operations(request.epoch, context) as operations:
            if why_not := busy(asked):
                paused = operations.paused() is not None
                _refuse(context, f"{why_not}{'; it is paused, too: `sloguard resume`' if paused else ''}")
            if not 0 <= request.duration_seconds <= LONGEST_S:
                text = f"duration_seconds: from 0 to {LONGEST_S} are allowed"
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
            why_not = refusal(
                self._config.window,
                time.time(),
                operations.paused(),
                operations.last_window(),
                serving_rate(self._hub, asked.engine_id),
                request.force,
            )
            if why_not:
                _refuse(context, why_not)
        asked.retune_duration_s = request.duration_seconds
        asked.retune.set()
        return pb.RetuneResponse()

    def Pause(self, request: pb.PauseRequest, context: grpc.ServicerContext) -> pb.PauseResponse:  # noqa: N802
        """Writes it down; the loop reads it before each window."""
        with self._operations(request.epoch, context) as operations:
            reason, paused = " ".join(request.reason.split())[:_LONGEST_REASON], operations.paused()
            if paused is not None and reason in ("", paused.reason):
                return pb.PauseResponse(summary="it was paused already")
            operations.record(Kind.PAUSED, reason=reason)
            if paused is not None:
                before = f', which was "{paused.reason}"' if paused.reason else ""
                return pb.PauseResponse(summary=f'it was paused already; its reason is now "{reason}"{before}')
        goes_on = "; the one that is open goes on" if self._requests.state in IN_A_WINDOW else ""
        return pb.PauseResponse(summary=f"paused: no window opens{goes_on}")

    def Resume(self, request: pb.ResumeRequest, context: grpc.ServicerContext) -> pb.ResumeResponse:  # noqa: N802
        """Takes a pause back."""
        with self._operations(request.epoch, context) as operations:
            if operations.paused() is None:
                return pb.ResumeResponse(summary="it was not paused")
            operations.record(Kind.RESUMED)
        return pb.ResumeResponse(summary="resumed: windows open again")

    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortResponse:  # noqa: N802
        """Leaves the loop a request to give the window up."""
        with self._operations(request.epoch, context):
            if self._requests.state in IN_A_WINDOW or self._requests.retune.is_set():
                self._requests.abort.set()
                return pb.AbortResponse(summary="the window is given up, and what served before it is restored")
        return pb.AbortResponse(summary=f"no window is open: the sidecar is {self._requests.state}")

    def Rollback(self, request: pb.RollbackRequest, context: grpc.ServicerContext) -> pb.RollbackResponse:  # noqa: N802
        """Writes it down; the loop sees that something else is to serve."""
        with self._operations(request.epoch, context) as operations:
            known = {p.id: p for p in operations.promotions()}
            promotion = known.get(request.promotion)
            current = operations.current()
            if promotion is None:
                _refuse(context, f"promotion: there is no promotion {request.promotion} to roll back")
            if promotion.rolled_back_at is not None:
                return pb.RollbackResponse(summary=f"promotion {promotion.id} was rolled back already")
            if current is None or current.id != promotion.id:
                _refuse(context, f"promotion: {promotion.id} is not what is promoted now")
            operations.roll_back(promotion.id, "the operator has asked for it")
            after = operations.current()
        if self._requests.state in IN_A_WINDOW:
            self._requests.abort.set()
        then = f"promotion {after.id} serves" if after is not None else "the file's own arguments serve"
        return pb.RollbackResponse(summary=f"promotion {promotion.id} is rolled back and quarantined: {then} next")

    @contextmanager
    def _operations(self, epoch: int, context: grpc.ServicerContext) -> Generator[Operations]:
        """The journal, on this thread; a request for another controller, or that can't be done, is refused."""
        own = self._requests.epoch
        if epoch and epoch != own:
            _refuse(context, f"epoch: {epoch} is not this controller's, which is {own}")
        try:
            with closing(Journal(self._config.state)) as journal:
                journal.act_for(own)
                journal.still_mine()
                yield Operations(journal, self._config.base_digest())
        except (JournalError, Superseded) as error:
            _refuse(context, str(error))


def busy(asked: Requests) -> str:
    """Why what the sidecar does now leaves no room for a window; empty where it serves."""
    if asked.state in (*IN_A_WINDOW, State.PROMOTING):
        return f"a window is open already: the sidecar is {asked.state}"
    if asked.state is State.HALTED:
        return "the sidecar is not up yet, or has ended"
    if asked.state is not State.SERVING:
        return f"vLLM does not serve yet: the sidecar is {asked.state}; ask again when it serves"
    return "a window has been asked for already" if asked.retune.is_set() else ""


def _refuse(context: grpc.ServicerContext, text: str) -> NoReturn:
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
    raise AssertionError  # abort has raised
