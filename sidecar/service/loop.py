"""The loop of `sloguard serve`: keeps vLLM serving, and drains it to tune in the configured windows.

Each cycle does the one thing that is due: restart a crashed engine, replace one that no longer runs the current
configuration, open a window, or probe the engine.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress

from sidecar.config.schema import Config
from sidecar.engine.engine import Cancelled, EngineCrashed
from sidecar.format import Say, when
from sidecar.record.action_queue import ActionOutcome, ActionQueue, OperatorAction
from sidecar.record.events import EventKind, WindowOutcome, window_ending
from sidecar.record.journal import JournalError, Superseded
from sidecar.record.states import Cause, State
from sidecar.record.trial import Trial
from sidecar.service.drain_hooks import HookRunner
from sidecar.service.journal_restore import JournalRestore
from sidecar.service.parts import ServiceParts
from sidecar.service.probation_monitor import ProbationMonitor
from sidecar.service.served_slo_file import ServedSloFile
from sidecar.service.serving_engine import ServingEngine
from sidecar.service.state_machine import StateMachine
from sidecar.service.tuning_window import TuningWindow, end_interrupted
from sidecar.service.window_policy import window_refusal
from sidecar.service.window_schedule import MissedWindows, WindowSchedule
from vllm_sloguard.agent.process_group import NotGoneError

_TICK_S = 0.5
_PROBE_EVERY_S = 5.0
# How long the loop waits for a journal locked by another process before it defers the write.
_PATIENCE_S = 1.0
_HOOK_AT_END_S = 5.0


class Service:
    """The main loop; single-threaded, on the thread that calls ``run``."""

    def __init__(self, config: Config, parts: ServiceParts, *, say: Say, notify: Callable[[Trial], None]) -> None:
        self._config = config
        self._parts = parts
        self._requests = parts.requests
        self.progress = self._progress = StateMachine(parts.journal, parts.metrics, parts.requests, say)
        self._hooks = HookRunner(config.window.hooks, parts.operations, say)
        self._serving = ServingEngine(config, parts, self._progress, self._hooks)
        self._watch = ProbationMonitor(config, parts.operations, self._serving, self._progress, parts.metrics)
        self._served_slo = ServedSloFile(config, parts.hub, parts.requests)
        self._journal_restore = JournalRestore(parts.journal, parts.requests, say)
        self._window = TuningWindow(
            config, parts, self._progress, self._serving, notify, journal_restore=self._journal_restore
        )
        self._actions = ActionQueue(parts.journal)
        self._schedule = WindowSchedule(config.window, time.time(), time.time())
        self._due_at: float | None = None  # of a window that may still open
        self._making_up: MissedWindows | None = None
        parts.journal.patience_s = _PATIENCE_S
        self._probed_at = 0.0
        self._trouble = ""
        self._behind = False

    def run(self) -> None:
        """Serves until a stop is requested.

        Raises EngineCrashed if the file's arguments do not start and never have, Superseded if another sidecar has
        taken over the state folder, and with it the engine.
        """
        try:
            self._run()
        except Superseded:
            raise
        except Exception as error:
            self._failed(error)
            raise

    def _run(self) -> None:
        try:
            self._begin()
        except Cancelled:
            self._halt()
            return
        while not self._requests.stop_sidecar.wait(_TICK_S):
            try:
                self._cycle()
            except (JournalError, NotGoneError, OSError) as error:
                # Full disks and unkillable processes must not end supervision.
                self._say_once(str(error))
        self._halt()

    def _begin(self) -> None:
        """Takes over from an earlier sidecar, up to the first token. Raises Cancelled, EngineCrashed, Superseded."""
        self._take_over()
        self._schedule = self._continued_schedule()
        self._making_up = self._window_to_make_up()
        end_interrupted(self._parts.journal, "the sidecar ended during the run", self._progress.say)
        self._serving.recover()
        self._end_window()
        self._probed_at = time.monotonic()

    def _take_over(self) -> None:
        try:
            self._requests.epoch = self._parts.journal.take_over(os.getpid())
            self._parts.runner.act_for(self._requests.epoch)
            self._parts.metrics.controller(self._requests.epoch)
            self._actions.take_over()
            self._requests.retune.set()  # an earlier sidecar may have left one pending
        except JournalError as error:
            self._say_once(str(error))
            self._parts.engines.act_without_journal()

    def _continued_schedule(self) -> WindowSchedule:
        """The schedule from where an earlier sidecar left it.

        What was due before its last busy time, a restart or a window, has a record, except for a window that could
        still have opened then.
        """
        window, now = self._config.window, time.time()
        try:
            busy_at, handled = self._parts.journal.last_busy_at(), self._parts.operations.handled_windows()
        except JournalError:
            busy_at, handled = None, []
        return WindowSchedule(window, now if busy_at is None else busy_at - window.lateness_s, now, handled)

    def _window_to_make_up(self) -> MissedWindows | None:
        """The window that an earlier sidecar missed and has not made up for."""
        if not self._config.window.make_up:
            return None
        try:
            due = self._parts.operations.missed_windows()
        except JournalError:
            return None
        return None if due is None else MissedWindows(*due, 1)

    def _say_once(self, trouble: str) -> None:
        """Logs a recurring problem once, until it changes."""
        if trouble != self._trouble:
            self._progress.say(trouble)
        self._trouble = trouble

    def _end_window(self) -> None:
        """Closes a window left open by an earlier sidecar."""
        try:
            if self._parts.operations.open_window() is not None:
                reason = "the sidecar ended during the window"
                self._parts.operations.record(EventKind.WINDOW_ENDED, outcome=WindowOutcome.STOPPED, reason=reason)
        except JournalError as error:
            self._progress.say(str(error))

    def _cycle(self) -> None:
        if not self._requests.epoch:
            self._take_over()
        self._hooks.after_restore()
        self._journal_restore.look()
        self._catch_up()
        self._observe_schedule()
        serving = self._serving
        if not serving.alive():
            serving.restart(Cause.ENGINE_CRASHED, "the serving engine crashed")
        elif serving.outdated():
            serving.replace(Cause.ROLLED_BACK, f"promotion {serving.promotion} was rolled back")
        elif (action := self._requested()) is not None:
            self._carry_out(action)
        elif self._open_due():
            pass
        elif serving.doubtful() or time.monotonic() - self._probed_at >= _PROBE_EVERY_S:
            self._look()
            return
        else:
            self._parts.journal.still_mine()
            return
        self._probed_at = time.monotonic()

    def _catch_up(self) -> None:
        """Retries failed journal writes once there is space. Raises Superseded.

        Called between windows: no trial is running, and the serving engine is the only one.
        """
        self._behind = not self._parts.journal.caught_up() or self._behind
        if not self._behind:
            return
        with suppress(JournalError):  # already reported when the write failed
            self._parts.journal.flush()
            self._serving.record_again()
            end_interrupted(self._parts.journal, "the journal could not be written", self._progress.say)
            self._end_window()
            self._behind = False

    def _requested(self) -> OperatorAction | None:
        """The pending retune, now marked as started."""
        if not self._requests.retune.is_set():
            return None
        self._requests.retune.clear()
        try:
            return self._actions.begin_retune()
        except JournalError:
            self._requests.retune.set()
            raise

    def _carry_out(self, action: OperatorAction) -> None:
        self._requests.retune.set()  # another may be accepted while this window ends
        if (paused := self._parts.operations.paused()) is not None:
            self._actions.end(action.id, ActionOutcome.REFUSED, f"paused: {paused.reason}")
            return
        ending = self._window.open(
            action.duration_s or self._config.window.duration, Cause.WINDOW_REQUESTED, "a window was requested"
        )
        self._actions.end(
            action.id, ActionOutcome.DONE, f"{window_ending(ending.outcome, ending.decision)}: {ending.reason}"
        )

    def _observe_schedule(self) -> None:
        """Records what was missed, before anything else is done; remembers the window that is due."""
        due, missed = self._schedule.due(time.time())
        if missed is not None:
            self._missed(missed)
        if due is not None:
            if self._due_at is not None:
                self._missed(MissedWindows(self._due_at, self._due_at, 1))
            self._due_at = due.at

    def _open_due(self) -> bool:
        """Opens the window that is due, or one to make up for a missed one; returns whether one was opened."""
        window = self._config.window
        if (due_at := self._due_at) is not None:
            self._due_at = None
            late_s = time.time() - due_at
            if 0 <= late_s <= window.lateness_s:
                return self._open_scheduled(due_at, window.duration - late_s, "the window has opened")
            self._missed(MissedWindows(due_at, due_at, 1))
        making_up = self._making_up
        if making_up is None or self._refusal():
            return False
        why = f"a window has opened to make up for the one that was due {when(making_up.last)}"
        return self._open_scheduled(making_up.last, window.duration, why)

    def _refusal(self) -> str:
        operations = self._parts.operations
        paused, last, rate = operations.paused(), operations.last_window(), self._serving.rate()
        return self._serving.mismatch or window_refusal(
            self._config.window, time.time(), paused, last, rate, force=False
        )

    def _open_scheduled(self, due: float, duration_s: float, why: str) -> bool:
        if why_not := self._refusal():
            self._progress.say(f"no window: {why_not}")
            self._parts.metrics.window_ended(WindowOutcome.REFUSED)
            self._record_unopened(WindowOutcome.REFUSED, why_not, first=due, last=due)
            return False
        self._making_up = None
        self._window.open(duration_s, Cause.WINDOW_SCHEDULED, why, due=due)
        return True

    def _missed(self, missed: MissedWindows) -> None:
        """Records windows that are too late to open, with what the sidecar was doing when they were due."""
        try:
            state = self._parts.journal.state_at(missed.last)
        except JournalError:
            state = None
        if state is None or state.state in (State.SERVING, State.HALTED):
            doing = "the sidecar was not running then, or the clock was changed"
        else:
            doing = f"the sidecar was {state.state} ({state.reason})"
        which = f"{missed.count} windows were due from {when(missed.first)} to" if missed.count > 1 else "one was due"
        reason = f"{which} {when(missed.last)}: {doing}"
        self._progress.say(f"missed: {reason}")
        self._parts.metrics.window_ended(WindowOutcome.MISSED)
        self._record_unopened(WindowOutcome.MISSED, reason, first=missed.first, last=missed.last)
        if self._config.window.make_up:
            self._making_up = missed

    def _record_unopened(self, outcome: WindowOutcome, reason: str, *, first: float, last: float) -> None:
        """Records windows that were due from ``first`` to ``last``, seconds since the epoch."""
        error = self._parts.operations.record_or_defer(
            EventKind.WINDOW_ENDED, outcome=outcome, reason=reason, first_due=first, last_due=last
        )
        if error is not None:
            self._say_once(str(error))

    def _look(self) -> None:
        """Probes the engine and checks the probation."""
        works = self._serving.probe()
        self._probed_at = time.monotonic()
        if not works:
            self._serving.restart(Cause.ENGINE_HANGS, "the serving engine hangs")
            return
        self._parts.metrics.pausing(paused=self._parts.operations.paused() is not None)
        self._watch.look()
        self._served_slo.update()

    def _failed(self, error: Exception) -> None:
        """Records the failure for `sloguard status`."""
        if self._progress.state is State.HALTED:
            return
        what = "the engine did not start" if isinstance(error, EngineCrashed) else type(error).__name__
        note = "; the engine keeps serving" if self._serving.alive() else ""
        self._progress.enter(State.HALTED, Cause.FAILED, f"failed: {what}: {' '.join(str(error).split())}{note}")

    def _halt(self) -> None:
        self._hooks.finish(_HOOK_AT_END_S)
        stopped = self._requests.stop_engine.is_set() and not self._parts.engines.outlive_sidecar
        if stopped or not self._serving.alive():
            self._progress.enter(State.HALTED, Cause.ENGINE_STOPPED, "stopped, with its engine")
            self._serving.end(drain=True)
        else:
            self._progress.enter(State.HALTED, Cause.ENGINE_LEFT, "stopped; the engine keeps serving")
