"""What others ask of a running sidecar: signals, and the control service on its private socket."""

import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import NoReturn

import grpc

from sidecar.config.schema import Config
from sidecar.config.window import LONGEST_WINDOW_S
from sidecar.observe.telemetry import TelemetryHub
from sidecar.record.events import EventKind, Operations
from sidecar.record.journal import Journal, JournalError, Superseded
from sidecar.record.states import IN_A_WINDOW
from sidecar.rpc import EPOCH_METADATA
from sidecar.service.mailbox import Mailbox, busy_reason, serving_rate
from sidecar.service.window_policy import window_refusal
from vllm_sloguard.wire import control_pb2 as pb
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceServicer

_LONGEST_REASON = 200


class Control(ControlServiceServicer):
    """Answers at once, from threads of its own: it writes the journal, or leaves a request for the loop."""

    def __init__(self, config: Config, requests: Mailbox, hub: TelemetryHub) -> None:
        self._config = config
        self._requests = requests
        self._hub = hub

    def Retune(self, request: pb.RetuneRequest, context: grpc.ServicerContext) -> pb.RetuneResponse:  # noqa: N802
        """Asks the loop for a window."""
        asked = self._requests
        with self._operations(request.epoch, context) as operations:
            if why_not := busy_reason(asked):
                paused = operations.paused() is not None
                _refuse(context, f"{why_not}{'; it is paused, too: `sloguard resume`' if paused else ''}")
            if not 0 <= request.duration_seconds <= LONGEST_WINDOW_S:
                text = f"duration_seconds: from 0 to {LONGEST_WINDOW_S} are allowed"
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
            why_not = window_refusal(
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
            operations.record(EventKind.PAUSED, reason=reason)
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
            operations.record(EventKind.RESUMED)
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
            context.set_trailing_metadata(((EPOCH_METADATA, str(own)),))
            _refuse(context, f"epoch: {epoch} is not this controller's, which is {own}")
        try:
            with closing(Journal(self._config.state)) as journal:
                journal.act_for(own)
                journal.still_mine()
                yield Operations(journal, self._config.base_digest())
        except (JournalError, Superseded) as error:
            _refuse(context, str(error))


def _refuse(context: grpc.ServicerContext, text: str) -> NoReturn:
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
    raise AssertionError  # abort has raised
