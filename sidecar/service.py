"""`sloguard serve`: keeps vLLM serving, and takes it down to tune in the windows of the configuration."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

import grpc
from cronsim import CronSim

from sidecar import promoted
from sidecar.config import Config
from sidecar.engine.engine import Cancelled, Engine, EngineCrashed
from sidecar.engine.http import Unanswered
from sidecar.engine.process_group import NotGoneError
from sidecar.guard import Args, Guard
from sidecar.journal import Journal, JournalError
from sidecar.metrics import Metrics
from sidecar.promotion import Decision, Outcome
from sidecar.runner import Runner
from sidecar.states import State, check
from sidecar.telemetry import TelemetryHub
from sidecar.trial import VALIDATING, Trial
from sidecar.tuner import Tuner, incumbent_args, open_run, seconds_of
from vllm_sloguard.wire import control_pb2
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceServicer

_TICK_S = 0.5
_PROBE_EVERY_S = 10.0
_PROBE_TIMEOUT_S = 30.0
_PROBES_TO_HANG = 2
_LONGEST_BACKOFF_S = 60.0

Say = Callable[[str], None]


@dataclass
class Requests:
    """What other threads ask of the loop: signals, and the control service."""

    stop_sidecar: threading.Event = field(default_factory=threading.Event)
    stop_engine: threading.Event = field(default_factory=threading.Event)
    retune: threading.Event = field(default_factory=threading.Event)
    retune_duration_s: float = 0.0
    may_retune: bool = False


class Control(ControlServiceServicer):
    """Takes `sloguard retune`."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    def Retune(  # noqa: N802
        self, request: control_pb2.RetuneRequest, context: grpc.ServicerContext
    ) -> control_pb2.RetuneResponse:
        """Asks the loop for a window."""
        if not self._requests.may_retune or self._requests.retune.is_set():
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "only a serving sidecar without a window can retune")
        if not 0 <= request.duration_seconds <= 7 * 86400:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "duration_seconds: from 0 to 604800 are allowed")
        self._requests.retune_duration_s = request.duration_seconds
        self._requests.retune.set()
        return control_pb2.RetuneResponse()


@dataclass(frozen=True)
class Parts:
    """What a sidecar works with, for as long as it holds its state folder."""

    journal: Journal
    runner: Runner
    guard: Guard
    hub: TelemetryHub
    metrics: Metrics
    requests: Requests


class Service:
    """The loop. Everything that it does happens on the thread that calls ``run``."""

    def __init__(self, config: Config, parts: Parts, *, say: Say, notify: Callable[[Trial], None]) -> None:
        self._config = config
        self._journal = parts.journal
        self._runner = parts.runner
        self._guard = parts.guard
        self._hub = parts.hub
        self._metrics = parts.metrics
        self._requests = parts.requests
        self._say = say
        self._notify = notify
        self._state = State.HALTED
        self._engine: Engine | None = None
        self._restore_s = 0.0
        self._window_end: float | None = None
        self._metrics.window_remaining.set_function(self._time_left)

    def run(self) -> None:
        """Serves until a stop is requested. Raises EngineCrashed when the first start fails."""
        try:
            self._recover()
        except Cancelled:
            self._halt()
            return
        opening = self._next_opening()
        probed_at, misses, steps = time.monotonic(), 0, 0
        while not self._requests.stop_sidecar.wait(_TICK_S):
            if self._engine is None or not self._engine.alive():
                self._restart()
                opening, misses = self._next_opening(), 0
                continue
            asked = self._requests.retune.is_set()
            if asked or (opening is not None and datetime.now().astimezone() >= opening):
                duration_s = self._requests.retune_duration_s if asked else 0.0
                why = "a window was asked for" if asked else "the window has opened"
                if asked:
                    self._requests.retune.clear()
                self._window(duration_s or self._config.window.duration, why)
                opening, misses, probed_at = self._next_opening(), 0, time.monotonic()
            if time.monotonic() - probed_at >= _PROBE_EVERY_S:
                misses, steps = self._probed(misses, steps)
                probed_at = time.monotonic()
        self._halt()

    # Serving

    def _recover(self) -> None:
        """Takes up what an earlier sidecar left: its serving engine if it is the right one, and nothing else."""
        self._end_interrupted("the sidecar ended during the run")
        args = incumbent_args(self._config, self._journal)
        self._enter(State.STARTING, "the sidecar has started")
        if (engine := self._adoptable(args)) is not None:
            self._runner.end_orphans(keep=engine.launch.engine_id)
            self._engine = engine
            self._serving(args, "the engine of an earlier sidecar serves on")
            return
        self._runner.end_orphans()
        try:
            self._start(args)
        except EngineCrashed as error:
            own = self._config.engine.args
            if dict(args) == own:
                raise
            self._say(f"what was promoted does not start any more: {error}")
            self._journal.promote(None, self._config.base_digest(), own)
            self._restore(own, "what was promoted does not start any more")
            return
        self._serving(args, "the engine is up")

    def _end_interrupted(self, why: str) -> None:
        """Ends what a run has left open; where the journal can't be written, the next start does it."""
        try:
            self._journal.abort_running()
            last = self._journal.last_run()
            if last is not None and last.ended_at is None:
                self._journal.end_run(last.id, {"outcome": "interrupted", "reason": why})
        except JournalError as error:
            self._say(str(error))

    def _adoptable(self, args: Args) -> Engine | None:
        for record in self._journal.engines():
            engine = self._runner.adopt(record, args)
            if engine is None or not engine.alive():
                continue
            try:
                engine.probe(_PROBE_TIMEOUT_S)
            except Unanswered:
                continue
            return engine
        return None

    def _start(self, args: Args) -> None:
        """Starts an engine for serving and waits for its first token. Raises EngineCrashed."""
        launch = self._runner.serving_launch(args)
        try:
            self._engine = self._runner.start(launch, "serving")
            took_s = self._engine.wait_ready(self._config.engine.start_timeout_s, self._requests.stop_engine.is_set)
        except Cancelled:
            self._end_engine(drain=False)
            raise
        except EngineCrashed as error:
            self._metrics.crashed(error.crash, "serving")
            if self._engine is not None:
                self._runner.learn(self._engine, error.crash)
            self._end_engine(drain=False)
            raise
        self._runner.learn(self._engine)
        self._restore_s = max(self._restore_s, took_s)
        self._metrics.seconds.labels("restore").set(took_s)

    def _serving(self, args: Args, why: str) -> None:
        repairs = self._runner.repairs(self._engine) if self._engine is not None else ()
        for change in repairs:
            self._say(f"the plugin changed {change.name} from {change.before} to {change.after}: {change.reason}")
        self._metrics.serving({**args, **{change.name: change.after for change in repairs}})
        self._metrics.engine_up.set(1)
        self._enter(State.SERVING, why)

    def _restart(self) -> None:
        """The serving engine has ended: start it again until it comes up or a stop is asked for."""
        if self._engine is not None:
            crash = self._engine.crashed("serving").crash
            self._metrics.crashed(crash, "serving")
            self._say(f"the serving engine crashed: {crash.category}: {crash.evidence}")
            self._runner.learn(self._engine, crash, started=False)
        self._restore(incumbent_args(self._config, self._journal), "the serving engine crashed")

    def _restore(self, args: Args, why: str) -> None:
        """Starts ``args`` for serving, again and again with growing pauses; a stop ends that after one more try."""
        self._metrics.engine_up.set(0)
        backoff_s = 1.0
        while not self._requests.stop_engine.is_set():
            try:
                self._end_engine(drain=False)
                self._enter(State.RESTORING, why)
                self._start(args)
            except Cancelled:
                return
            except (EngineCrashed, NotGoneError, JournalError, OSError) as error:
                self._say(f"the engine did not come up, again in {backoff_s:.0f} s: {error}")
                if self._requests.stop_sidecar.wait(backoff_s):
                    return
                backoff_s = min(backoff_s * 2, _LONGEST_BACKOFF_S)
                continue
            self._serving(args, f"{why}; restored")
            return

    def _probed(self, misses: int, steps_before: int) -> tuple[int, int]:
        """One real token, or steps since the last probe, show that the engine works; else it is killed."""
        assert self._engine is not None
        steps = self._hub.of(self._engine.launch.engine_id).total_steps
        try:
            self._engine.probe(_PROBE_TIMEOUT_S)
        except Unanswered:
            misses = 0 if steps > steps_before else misses + 1
        else:
            misses = 0
        if misses >= _PROBES_TO_HANG:
            self._say("the serving engine hangs and is killed")
            self._engine.group.kill()
        self._engine.trim_log()
        return misses, steps

    # The window

    def _next_opening(self) -> datetime | None:
        cron = self._config.window.cron
        return next(CronSim(cron, datetime.now().astimezone())) if cron else None

    def _window(self, duration_s: float, why: str) -> None:
        before = incumbent_args(self._config, self._journal)
        decision: Decision | None = None
        try:
            self._window_end = time.monotonic() + duration_s
            self._drain(why)
            decision = self._tune()
        except Cancelled:
            why = "a stop was asked for" if self._requests.stop_sidecar.is_set() else "no time was left for the trial"
        except Exception as error:  # noqa: BLE001 - the boundary of a window: whatever it fails of, the service is back
            why = f"the window failed: {type(error).__name__}: {error}"
        if decision is None:
            self._say(why)
        if self._state is State.SERVING:
            self._window_end = None
            return
        if decision is None:
            self._end_interrupted(why)
        if not self._requests.stop_engine.is_set():
            if decision is not None and decision.outcome is Outcome.PROMOTED:
                self._promote(before, decision)
            else:
                self._restore(before, decision.reason if decision else why)
        self._window_end = None

    def _drain(self, why: str) -> None:
        """Not ready from here on; then vLLM takes no new requests and finishes those in flight. Raises Cancelled."""
        began = time.monotonic()
        self._enter(State.DRAINING, why)
        if self._requests.stop_sidecar.wait(self._config.window.notice):
            self._enter(State.SERVING, "a stop was asked for before the drain")
            raise Cancelled
        self._end_engine(drain=True)
        self._metrics.engine_up.set(0)
        self._metrics.seconds.labels("drain").set(time.monotonic() - began)

    def _tune(self) -> Decision:
        run = open_run(self._config, self._journal)
        self._enter(State.TUNING, f"run {run.id}")

        def notify(trial: Trial) -> None:
            if trial.plan.role in VALIDATING and self._state is not State.VALIDATING:
                self._enter(State.VALIDATING, trial.plan.reason)
            self._metrics.trial(trial, self._journal.trials(run.id))
            self._notify(trial)

        def fits(search: int, validations: int) -> bool:
            trials = self._journal.trials(run.id)
            # A sidecar that took an engine over has not seen a start yet but those of its trials.
            starts = [t.result.start_s for t in trials if t.result is not None and t.result.start_s is not None]
            self._restore_s = max(self._restore_s, *starts, 0.0)
            return self._time_left() >= self._restore_s + seconds_of(trials, search, validations, self._restore_s)

        def cancelled() -> bool:
            return self._requests.stop_sidecar.is_set() or self._time_left() < self._restore_s

        decision = Tuner(
            self._config,
            run,
            self._journal,
            self._runner,
            self._guard,
            notify=notify,
            fits=fits,
            cancelled=cancelled,
        ).tune()
        self._metrics.decided(decision)
        self._say(f"run {run.id}: {decision.outcome}: {decision.reason}")
        promoted.write(
            self._config, incumbent_args(self._config, self._journal), decision, self._journal.trials(run.id)
        )
        return decision

    def _promote(self, before: Args, decision: Decision) -> None:
        args = incumbent_args(self._config, self._journal)
        self._enter(State.PROMOTING, decision.reason)
        try:
            self._start(args)
        except Cancelled:
            return
        except EngineCrashed as error:
            # It has run in this window again and again, and yet: what served before is the last known good.
            self._journal.promote(None, self._config.base_digest(), dict(before))
            self._restore(before, f"the promoted configuration did not start: {error}")
            return
        self._serving(args, decision.reason)

    def _time_left(self) -> float:
        """Seconds until the window's end, 0 outside of one; also called by scrapes, on their threads."""
        end = self._window_end
        return 0.0 if end is None else max(end - time.monotonic(), 0.0)

    # States

    def _enter(self, state: State, why: str) -> None:
        check(self._state, state)
        until = time.time() + self._time_left() if self._window_end is not None else None
        try:
            self._journal.enter(str(state), why, until)
        except JournalError as error:
            # To serve comes before to record.
            self._say(str(error))
        self._state = state
        self._requests.may_retune = state is State.SERVING
        self._metrics.entered(state, ready=state is State.SERVING)
        self._say(f"{state}: {why}")

    def _end_engine(self, *, drain: bool) -> None:
        if self._engine is not None:
            self._runner.end(self._engine, drain=drain)
            self._engine = None

    def _halt(self) -> None:
        if self._requests.stop_engine.is_set() or self._engine is None:
            self._enter(State.HALTED, "stopped, with its engine")
            self._end_engine(drain=True)
        else:
            self._enter(State.HALTED, "stopped; the engine serves on")
