"""The control service: operators' requests to a running sidecar, over its private socket or remote gRPC."""

import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import Any, NoReturn

import grpc

from sidecar.config.schema import Config
from sidecar.config.window import LONGEST_WINDOW_S
from sidecar.observe.telemetry import TelemetryHub
from sidecar.record.action_queue import ActionKind, ActionOutcome, ActionQueue, Door, Sender
from sidecar.record.events import EventKind, Operations
from sidecar.record.journal import Journal, JournalError, Superseded
from sidecar.record.states import IN_A_WINDOW
from sidecar.service.mailbox import Mailbox, busy_reason, serving_rate
from sidecar.service.window_policy import window_refusal
from vllm_sloguard.agent.grpc_server import EPOCH_METADATA
from vllm_sloguard.wire import control_pb2 as pb
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceServicer

_LONGEST_REASON = 200
_RESTORED_WITHIN_S = 5.0
_POLL_S = 0.05
# gRPC metadata by which a client on the private socket identifies itself.
DOOR_KEY, USER_KEY = "sloguard-door", "sloguard-user"


class Control(ControlServiceServicer):
    """Runs on gRPC threads and never waits for the loop: writes the journal, or leaves a request in the mailbox."""

    def __init__(self, config: Config, requests: Mailbox, hub: TelemetryHub) -> None:
        self._config = config
        self._requests = requests
        self._hub = hub

    def Retune(self, request: pb.RetuneRequest, context: grpc.ServicerContext) -> pb.RetuneResponse:  # noqa: N802
        """Requests a tuning window."""
        asked = self._requests
        with self._journal(request.epoch, context) as (operations, actions):
            why_not = busy_reason(asked)
            if why_not:
                why_not += "; it is also paused: `sloguard resume`" if operations.paused() is not None else ""
            elif actions.waiting():
                why_not = "a window has already been requested"
            if not 0 <= request.duration_seconds <= LONGEST_WINDOW_S:
                text = f"duration_seconds: from 0 to {LONGEST_WINDOW_S} are allowed"
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
            why_not = why_not or window_refusal(
                self._config.window,
                time.time(),
                operations.paused(),
                operations.last_window(),
                serving_rate(self._hub, asked.engine_id),
                request.force,
            )
            if why_not:
                actions.settle(ActionKind.RETUNE, _sender(context), ActionOutcome.REFUSED, why_not)
                _refuse(context, why_not)
            actions.accept(ActionKind.RETUNE, _sender(context), request.duration_seconds)
        asked.retune.set()
        return pb.RetuneResponse()

    def Pause(self, request: pb.PauseRequest, context: grpc.ServicerContext) -> pb.PauseResponse:  # noqa: N802
        """Records the pause and cancels any retune that has not started; the loop checks both before each window."""
        with self._journal(request.epoch, context) as (operations, actions):
            reason, paused = " ".join(request.reason.split())[:_LONGEST_REASON], operations.paused()
            if paused is not None and reason in ("", paused.reason):
                actions.settle(ActionKind.PAUSE, _sender(context), ActionOutcome.DONE, "already paused")
                return pb.PauseResponse(summary="already paused")
            cancelled, started = actions.pause(_sender(context), reason)
            if paused is not None:
                before = f', was "{paused.reason}"' if paused.reason else ""
                return pb.PauseResponse(summary=f'already paused; the reason is now "{reason}"{before}')
        summary = "paused: no window will open"
        if cancelled:
            summary += "; the pending retune is cancelled"
        elif started or self._requests.state in IN_A_WINDOW:
            summary += "; the window in progress continues: `sloguard abort` ends it"
        return pb.PauseResponse(summary=summary)

    def Resume(self, request: pb.ResumeRequest, context: grpc.ServicerContext) -> pb.ResumeResponse:  # noqa: N802
        """Lifts a pause."""
        with self._journal(request.epoch, context) as (operations, actions):
            if operations.paused() is None:
                actions.settle(ActionKind.RESUME, _sender(context), ActionOutcome.DONE, "not paused")
                return pb.ResumeResponse(summary="not paused")
            operations.record(EventKind.RESUMED)
            actions.settle(ActionKind.RESUME, _sender(context), ActionOutcome.DONE, "")
        return pb.ResumeResponse(summary="resumed: windows can open again")

    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortResponse:  # noqa: N802
        """Aborts the open window, or cancels a retune that has not started."""
        with self._journal(request.epoch, context) as (_, actions):
            if actions.cancel_retunes("aborted before it started"):
                summary = "the pending retune is cancelled: no window will open for it"
                actions.settle(ActionKind.ABORT, _sender(context), ActionOutcome.DONE, summary)
                return pb.AbortResponse(summary=summary)
            action = actions.accept(ActionKind.ABORT, _sender(context))
            if self._requests.abort_window(action):
                return pb.AbortResponse(summary="the window is aborted, and the previous configuration is restored")
            summary = f"no window is open: the sidecar is {self._requests.state}"
            actions.end(action, ActionOutcome.TOO_LATE, summary)
        return pb.AbortResponse(summary=summary)

    def Rollback(self, request: pb.RollbackRequest, context: grpc.ServicerContext) -> pb.RollbackResponse:  # noqa: N802
        """Records the rollback; the loop then notices that the current configuration has changed."""
        with self._journal(request.epoch, context) as (operations, actions):
            known = {p.id: p for p in operations.promotions()}
            promotion = known.get(request.promotion)
            current = operations.current()
            if promotion is None:
                _refuse(context, f"promotion: there is no promotion {request.promotion} to roll back")
            if promotion.rolled_back_at is not None:
                return pb.RollbackResponse(summary=f"promotion {promotion.id} was already rolled back")
            if current is None or current.id != promotion.id:
                _refuse(context, f"promotion: {promotion.id} is not the current promotion")
            operations.roll_back(promotion.id, "requested by the operator")
            after = operations.current()
            then = f"promotion {after.id} serves" if after is not None else "the file's own arguments serve"
            summary = f"promotion {promotion.id} is rolled back and quarantined: {then} next"
            actions.settle(ActionKind.ROLLBACK, _sender(context), ActionOutcome.DONE, summary)
        self._requests.abort_window()
        return pb.RollbackResponse(summary=summary)

    @contextmanager
    def _journal(self, epoch: int, context: grpc.ServicerContext) -> Generator[tuple[Operations, ActionQueue]]:
        """Opens the journal on this thread; refuses requests meant for another controller, and journal errors."""
        own = self._requests.epoch
        if epoch and epoch != own:
            context.set_trailing_metadata(((EPOCH_METADATA, str(own)),))
            _refuse(context, f"epoch: {epoch} is not this controller's, which is {own}")
        try:
            with self._intact_journal_files(), closing(Journal(self._config.state)) as journal:
                journal.act_for(own)
                journal.still_mine()
                yield Operations(journal, self._config.base_digest()), ActionQueue(journal)
        except (JournalError, Superseded) as error:
            _refuse(context, str(error))

    @contextmanager
    def _intact_journal_files(self) -> Generator[None]:
        """Waits for the loop to restore deleted files: another connection of this process would damage the journal."""
        deadline = time.monotonic() + _RESTORED_WITHIN_S
        while True:
            with self._requests.journal_connections:
                gone = self._requests.deleted_journal_files()
                if not gone:
                    yield
                    return
            if time.monotonic() > deadline:
                raise JournalError(f"{', '.join(gone)} was deleted and is not restored yet: try again")
            time.sleep(_POLL_S)


def _sender(context: grpc.ServicerContext) -> Sender:
    """Who gives an action. A remote sender is authenticated by certificate; a local one states its own name."""
    if not context.peer().startswith("unix"):
        names: Any = context.auth_context().get("x509_common_name", [])
        return Sender(Door.REMOTE, bytes(names[0]).decode("utf-8", errors="replace") if names else "")
    sent = {key: value if isinstance(value, str) else "" for key, value in context.invocation_metadata()}
    door = Door.PAGE if sent.get(DOOR_KEY) == Door.PAGE else Door.CLI
    return Sender(door, sent.get(USER_KEY, "")[:_LONGEST_REASON])


def _refuse(context: grpc.ServicerContext, text: str) -> NoReturn:
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
    raise AssertionError  # abort has raised
