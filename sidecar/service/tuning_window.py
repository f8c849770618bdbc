"""One tuning window of `sloguard serve`: drain, tune, and restore service in time, whatever fails."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import suppress

from sidecar.config.schema import Config
from sidecar.engine.agent_client import AgentLost
from sidecar.engine.engine import Cancelled
from sidecar.promote import promoted_file
from sidecar.promote.candidate import SearchedSpace, candidate
from sidecar.record.action_queue import ActionOutcome, ActionQueue
from sidecar.record.decisions import Decision, Outcome
from sidecar.record.durations import seconds_of
from sidecar.record.events import EventKind, WindowOutcome, window_ending
from sidecar.record.journal import Journal, JournalError, Superseded
from sidecar.record.journal_file import JournalLocked
from sidecar.record.states import Cause, State
from sidecar.record.trial import VALIDATING, Plan, Trial
from sidecar.record.wording import OUTCOMES
from sidecar.run.tuning_run import Tuner, incumbent_args, open_run
from sidecar.service.journal_restore import JournalRestore
from sidecar.service.parts import ServiceParts
from sidecar.service.serving_engine import ServingEngine
from sidecar.service.state_machine import StateMachine

_POLL_S = 0.1
# How long a trial waits for a journal locked by another process, within the window's time.
_PATIENCE_S = 120.0
_CAUSES = {
    WindowOutcome.PROMOTED: Cause.PROMOTED,
    WindowOutcome.KEPT: Cause.KEPT,
    WindowOutcome.ABORTED: Cause.WINDOW_ABORTED,
    WindowOutcome.STOPPED: Cause.STOPPED,
    WindowOutcome.OUT_OF_TIME: Cause.WINDOW_OUT_OF_TIME,
}
_DECIDED = (WindowOutcome.PROMOTED, WindowOutcome.KEPT)


@dataclasses.dataclass(frozen=True)
class WindowEnd:
    """How a window ended, and why."""

    outcome: WindowOutcome
    reason: str
    decision: Outcome | None


class _RefusedError(RuntimeError):
    """The window was refused before the drain; service was not interrupted."""


class TuningWindow:
    """Runs one window at a time; ``notify`` is called with each trial."""

    def __init__(
        self,
        config: Config,
        parts: ServiceParts,
        progress: StateMachine,
        serving: ServingEngine,
        notify: Callable[[Trial], None],
        *,
        journal_restore: JournalRestore,
    ) -> None:
        self._config = config
        self._parts = parts
        self._progress = progress
        self._serving = serving
        self._notify = notify
        self._journal_restore = journal_restore
        self._actions = ActionQueue(parts.journal)

    def open(self, duration_s: float, cause: Cause, why: str, *, due: float | None = None) -> WindowEnd:
        """Runs one window, from serving to serving; ``due`` is when a scheduled one was to open."""
        outcome, reason, decided = WindowOutcome.FAILED, "", None
        self._parts.requests.begin_window()
        try:
            self._record_opened(due, why)
            self._progress.window_end = time.monotonic() + duration_s
            self._drain(cause, why)
            decision = self._tune_patiently()
            outcome = WindowOutcome.PROMOTED if decision.outcome is Outcome.PROMOTED else WindowOutcome.KEPT
            reason, decided = decision.reason, decision.outcome
        except Superseded:
            raise
        except _RefusedError as error:
            outcome, reason = WindowOutcome.REFUSED, str(error)
        except Cancelled:
            outcome, reason = self._given_up()
        except JournalLocked as error:  # tuning itself did not fail, so the next window need not wait
            outcome = WindowOutcome.REFUSED if self._progress.serves() else WindowOutcome.INTERRUPTED
            reason = str(error)
        except AgentLost as error:
            outcome, reason = WindowOutcome.INTERRUPTED, str(error)
        except Exception as error:  # noqa: BLE001 - the boundary of a window: service is restored after any failure
            reason = f"the window failed: {type(error).__name__}: {error}"
        outcome, reason = self._come_back(outcome, reason)
        self._progress.window_end = None
        aborts = self._parts.requests.end_window()
        return self._end(WindowEnd(outcome, reason, decided if outcome in _DECIDED else None), due, aborts)

    def _record_opened(self, due: float | None, why: str) -> None:
        record = dataclasses.asdict(self._serving.record())
        if not self._parts.operations.record_opened(due, reason=why, record=record):
            raise _RefusedError("a pause came first")

    def _tune_patiently(self) -> Decision:
        """Tunes with a longer journal timeout: trials can wait for a lock, the service can't."""
        journal = self._parts.journal
        before = journal.patience_s
        journal.patience_s, journal.give_up = _PATIENCE_S, self._is_over
        try:
            return self._tune()
        finally:
            journal.patience_s, journal.give_up = before, bool

    def _is_over(self) -> bool:
        return self._stopped() or self._progress.time_left() < self._serving.restore_s

    def _is_over_while_watching(self) -> bool:
        with suppress(JournalError):
            self._journal_restore.look()
        return self._is_over()

    def _given_up(self) -> tuple[WindowOutcome, str]:
        requests = self._parts.requests
        if requests.stop_sidecar.is_set():
            return WindowOutcome.STOPPED, "a stop was requested"
        if requests.abort.is_set():
            return WindowOutcome.ABORTED, "the window was aborted"
        return WindowOutcome.OUT_OF_TIME, "no time was left for the trial"

    def _drain(self, cause: Cause, why: str) -> None:
        """Fails readiness first, then lets vLLM finish the requests in flight and stops it."""
        began = time.monotonic()
        self._progress.enter(State.DRAINING, cause, why)
        problem = self._serving.hooks.before_drain(self._drain_is_pointless)
        if problem and not self._drain_is_pointless():
            self._progress.enter(State.SERVING, Cause.WINDOW_REFUSED, problem)
            raise _RefusedError(problem)
        while time.monotonic() < began + self._config.window.notice and not self._drain_is_pointless():
            time.sleep(_POLL_S)
        if not self._drain_is_pointless():
            self._serving.drained(self._drain_is_pointless)
        if self._stopped():
            outcome, reason = self._given_up()
            self._progress.enter(State.SERVING, _CAUSES[outcome], f"{reason} before the drain")
            raise Cancelled
        if not self._serving.alive():
            problem = "the serving engine crashed before it was drained"
            self._serving.restart(Cause.ENGINE_CRASHED, problem)
            raise _RefusedError(problem)
        self._parts.metrics.engine_answers(up=False)
        self._serving.end(drain=True)

    def _drain_is_pointless(self) -> bool:
        return self._stopped() or not self._serving.alive()

    def _stopped(self) -> bool:
        return self._parts.requests.stop_sidecar.is_set() or self._parts.requests.abort.is_set()

    def _tune(self) -> Decision:
        if self._stopped():  # during the drain
            raise Cancelled
        config, journal, metrics = self._config, self._parts.journal, self._parts.metrics
        run = open_run(config, journal)
        self._progress.enter(State.TUNING, Cause.DRAINED, f"the service is drained for run {run.id}")

        def begin(plan: Plan) -> None:
            if plan.role in VALIDATING and self._progress.state is not State.VALIDATING:
                best = candidate(journal.trials(run.id), SearchedSpace.of(config))
                which = "the best trial" if best is None else f"trial {best.number}, the best of the search,"
                why = f"{which} and the incumbent are re-measured (alternating)"
                self._progress.enter(State.VALIDATING, Cause.CANDIDATE_FOUND, why)

        def notify(trial: Trial) -> None:
            metrics.trial(trial, journal.trials(run.id))
            self._notify(trial)

        def fits(search: int, validations: int) -> bool:
            trials = journal.trials(run.id)
            # A sidecar that adopted its engine may have seen no starts other than its trials'.
            starts = [t.result.start_s for t in trials if t.result is not None and t.result.start_s is not None]
            self._serving.restore_s = max(self._serving.restore_s, *starts, 0.0)
            restore_s = self._serving.restore_s
            return self._progress.time_left() >= restore_s + seconds_of(trials, search, validations, restore_s)

        tuner = Tuner(
            config,
            run,
            journal,
            self._parts.runner,
            self._parts.guard,
            learn=self._parts.engines.learn,
            begin=begin,
            notify=notify,
            fits=fits,
            cancelled=self._is_over_while_watching,
        )
        decision = tuner.tune()
        metrics.decided(decision)
        self._progress.say(f"run {run.id}: {OUTCOMES[decision.outcome]}: {decision.reason}")
        promoted_file.write(config, incumbent_args(config, journal), decision, journal.trials(run.id))
        return decision

    def _come_back(self, outcome: WindowOutcome, reason: str) -> tuple[WindowOutcome, str]:
        """Restores service with the current configuration; returns the window's final outcome and reason."""
        if self._progress.serves():
            return outcome, reason
        if outcome not in _DECIDED:
            end_interrupted(self._parts.journal, reason, self._progress.say)
        winner = self._serving.wanted()[0] if outcome is WindowOutcome.PROMOTED else None
        state = State.PROMOTING if winner is not None else State.RESTORING
        self._serving.bring_up(state, _CAUSES.get(outcome, Cause.WINDOW_FAILED), reason)
        if winner is not None and self._progress.serves() and self._serving.promotion != winner:
            return WindowOutcome.FAILED, f"promotion {winner} did not start"
        return outcome, reason

    def _end(self, end: WindowEnd, due: float | None, aborts: list[int]) -> WindowEnd:
        outcome, reason = end.outcome, end.reason
        ending = window_ending(outcome, end.decision)
        self._progress.say(f"the window has ended: {ending}: {reason}")
        self._parts.metrics.window_ended(outcome)
        if self._progress.serves():
            self._serving.hooks.after_restore()
        error = self._parts.operations.record_or_defer(
            EventKind.WINDOW_ENDED, outcome=outcome, reason=reason, decision=end.decision, first_due=due, last_due=due
        )
        if error is not None:
            self._progress.say(str(error))
        for action in aborts:
            if outcome is WindowOutcome.ABORTED:
                self._actions.end(action, ActionOutcome.DONE, "the window was aborted")
            else:
                self._actions.end(action, ActionOutcome.TOO_LATE, f"the window had ended: {ending}")
        return end


def end_interrupted(journal: Journal, why: str, say: Callable[[str], None]) -> None:
    """Closes an unfinished run; if the journal can't be written, the next start does it. Raises Superseded."""
    try:
        journal.abort_running()
        last = journal.last_run()
        if last is not None and last.ended_at is None:
            journal.end_run(last.id, Decision(Outcome.INTERRUPTED, why))
    except JournalError as error:
        say(str(error))
