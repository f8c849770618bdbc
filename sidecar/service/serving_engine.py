"""The serving engine: adopts or starts it, probes it, restarts it, and replaces it after a promotion or rollback."""

import time
from collections.abc import Callable

from sidecar.config.schema import Config
from sidecar.engine.engine import Cancelled, Engine, EngineCrashed
from sidecar.format import setting
from sidecar.guard.guard import Args
from sidecar.observe.user_requests import Record, UserRequest, real_requests, summarize
from sidecar.promote import promoted_file
from sidecar.promote.probation import ProbationVerdict, Ruling, crash_loop
from sidecar.record.events import EventKind
from sidecar.record.journal import JournalError
from sidecar.record.states import COMING_UP, Cause, State
from sidecar.service.drain_hooks import HookRunner
from sidecar.service.mailbox import serving_rate
from sidecar.service.parts import ServiceParts
from sidecar.service.state_machine import StateMachine
from vllm_sloguard.agent.engine_http import Unanswered
from vllm_sloguard.agent.process_group import NotGoneError
from vllm_sloguard.crash import Category, Crash

_PROBES_TO_HANG = 2
_LONGEST_BACKOFF_S = 60.0
_POLL_S = 0.1
_IDLE_S = 0.5
# A start that fails for this reason says nothing about the configuration.
_PORT_TAKEN = "Address already in use"


class ServingEngine:
    """Keeps the current configuration serving: the latest promotion in the journal, or the file's own arguments.

    ``promotion`` is the id of the promotion now serving, None for the file's arguments; ``restore_s`` is how long a
    restore may take.
    """

    def __init__(self, config: Config, parts: ServiceParts, progress: StateMachine, hooks: HookRunner) -> None:
        self._config = config
        self._journal = parts.journal
        self._operations = parts.operations
        self._engines = parts.engines
        self._hub = parts.hub
        self._metrics = parts.metrics
        self._requests = parts.requests
        self._progress = progress
        self.hooks = hooks
        self._engine: Engine | None = None
        self._wanted: tuple[int | None, Args] = (None, config.engine.args)
        self._undone: set[int] = set()
        self._crashes: list[tuple[int | None, float]] = []  # promotion, monotonic seconds
        self._misses = self._steps = 0
        self._probe_timeout_s = config.engine.hang_timeout_s / _PROBES_TO_HANG
        self.promotion: int | None = None
        self.restore_s = 0.0
        self.mismatch = ""  # why the serving engine does not match the journal
        parts.metrics.clock_restore(lambda: self.restore_s or config.engine.start_timeout_s)

    # Current configuration

    def wanted(self) -> tuple[int | None, Args]:
        """The current promotion (or None) and its arguments; the last known ones if the journal can't be read."""
        try:
            holding = (p for p in reversed(self._operations.promotions()) if p.rolled_back_at is None)
            current = next((p for p in holding if p.id not in self._undone), None)
        except JournalError as error:
            self._progress.say(str(error))
            return self._wanted
        self._wanted = (current.id, current.args) if current else (None, self._config.engine.args)
        self._metrics.promoted(self._wanted[1], self._wanted[0])
        return self._wanted

    def outdated(self) -> bool:
        """Whether the engine runs something other than the current configuration."""
        return not self.mismatch and self.wanted()[0] != self.promotion

    def roll_back(self, promotion: int, ruling: Ruling) -> None:
        """Rolls back and quarantines ``promotion``; does not touch the running engine."""
        self._progress.say(f"promotion {promotion} is rolled back and quarantined: {ruling.reason}")
        self._undone.add(promotion)  # holds even if the journal can't be written
        self._metrics.rolled_back(ruling.verdict)
        try:
            self._operations.roll_back(promotion, ruling.reason)
        except JournalError as error:
            self._progress.say(str(error))

    # Startup

    def recover(self) -> None:
        """Adopts an earlier sidecar's engine if it runs the current configuration, else starts one; ends orphans.

        Raises EngineCrashed if the file's arguments have never served and do not start, Cancelled.
        """
        last = self._journal.state()
        self._progress.enter(State.STARTING, Cause.STARTED, "the sidecar has started")
        promotion, args = self.wanted()
        self._crashes = self._earlier_crashes()
        self.restore_s = self._operations.longest_start_s() or 0.0
        self._engine = self._adoptable(args, coming_up=last is not None and last.state in COMING_UP)
        if self._engine is None:
            self._engine = self._unrecorded(args)
        try:
            self._engines.orphans.end(keep=self._engine.launch.engine_id if self._engine is not None else "")
        except (NotGoneError, OSError) as error:
            self._progress.say(str(error))
        if self._engine is not None:
            self._up(promotion, Cause.ENGINE_TAKEN_OVER, self.mismatch or "took over the engine of an earlier sidecar")
            return
        first = promotion is None and not self.restore_s
        self.bring_up(State.STARTING, Cause.STARTED, "the sidecar has started", give_up=first)

    def _earlier_crashes(self) -> list[tuple[int | None, float]]:
        since = time.time() - self._config.promotion.probation.crashes_within
        events = self._operations.events([EventKind.CRASH], since=since)
        return [(e.content["promotion"], time.monotonic() - max(time.time() - e.at, 0.0)) for e in events]

    def _adoptable(self, args: Args, *, coming_up: bool) -> Engine | None:
        for left in self._journal.engines():
            engine = self._engines.adopt(left, args)
            if engine is not None and engine.alive() and self._answers(engine, coming_up=coming_up):
                return engine
        return None

    def _answers(self, engine: Engine, *, coming_up: bool) -> bool:
        """Whether an engine found running serves; one that does not within ``engine.hang_timeout_s`` is ended.

        ``coming_up``: it may still be starting, after the sidecar that started it has gone.
        """
        if engine.foreign_on_port():
            return False
        config = self._config.engine
        left_s = config.start_timeout_s - engine.group.age_s() if coming_up else 0.0
        try:
            engine.wait_ready(max(left_s, config.hang_timeout_s), self._requests.stop_engine.is_set)
        except (EngineCrashed, NotGoneError) as error:
            self._progress.say(f"the engine of an earlier sidecar does not answer: {error}")
            return False
        return True

    def _unrecorded(self, args: Args) -> Engine | None:
        """A serving engine missing from the journal, because the disk was full or the journal is an older copy.

        It is never killed for that: if it does not match the journal, it keeps serving and the operator decides.
        """
        found = self._engines.unrecorded_serving(args)
        if found is None:
            return None
        if not self._answers(found.engine, coming_up=True):
            return None
        if found.matches:
            try:
                self._engines.record_alone(found.engine)
            except JournalError as error:
                self._progress.say(str(error))
        else:
            pid = found.engine.group.identity.pid
            self.mismatch = (
                f"the running engine (process {pid}) does not match the journal, which may be an older copy: it is left"
                f" running and no window opens; to serve the journal's configuration, end process {pid}"
            )
            self._requests.mismatch = self.mismatch
        return found.engine

    def bring_up(self, state: State, cause: Cause, why: str, *, give_up: bool = False) -> None:
        """Starts the current configuration, retrying with exponential backoff; a stop allows one more attempt.

        With ``give_up``, raises the first attempt's EngineCrashed unless the cause was external.
        """
        self._metrics.engine_answers(up=False)
        backoff_s = 1.0
        while not self._requests.stop_engine.is_set():
            if state is not State.STARTING:  # entered by ``recover`` already
                self._progress.enter(state, cause, why)
            promotion, args = self.wanted()
            try:
                self._start(promotion, args)
            except Cancelled:
                return
            except EngineCrashed as error:
                if give_up and _says_no(error.crash):
                    raise
                problem, undone = error, self._did_not_start(promotion, error.crash)
            except (NotGoneError, JournalError, OSError) as error:
                problem, undone = error, False
            else:
                self._up(promotion, cause, why if state is State.PROMOTING else f"{why}; it is up")
                return
            state = State.RESTORING
            if undone:
                cause, why = Cause.ROLLED_BACK, f"promotion {promotion} does not start"
                continue
            self._progress.say(f"the engine did not come up, retrying in {backoff_s:.0f} s: {problem}")
            if self._requests.stop_sidecar.wait(backoff_s):
                return
            backoff_s = min(backoff_s * 2, _LONGEST_BACKOFF_S)

    def _start(self, promotion: int | None, args: Args) -> None:
        """One start, up to the first token. Raises EngineCrashed, Cancelled, NotGoneError, OSError."""
        began = time.monotonic()
        self.end(drain=False)
        self.mismatch = self._requests.mismatch = ""
        try:
            self._engine = self._engines.serve(args, self._began, self._requests.stop_engine.is_set)
        except Cancelled:
            self.end(drain=False)
            raise
        except EngineCrashed as error:
            self._metrics.crashed(error.crash, "serving")
            if self._engine is not None:
                self._engines.learn(self._engine.launch, error.crash)
            self.end(drain=False)
            raise
        self._engines.learn(self._engine.launch)
        took_s = time.monotonic() - began
        self.restore_s = max(self.restore_s, took_s)
        self._record(EventKind.START, base=self._config.base_digest(), promotion=promotion, seconds=took_s)

    def _began(self, engine: Engine) -> None:
        self._engine = engine

    def _did_not_start(self, promotion: int | None, crash: Crash) -> bool:
        """Rolls back a promotion that does not start; returns whether to start its predecessor at once."""
        self._record(EventKind.CRASH, promotion=promotion, reason=f"{crash.category}: {crash.evidence}")
        if promotion is None or _PORT_TAKEN in crash.evidence:
            return False
        self.roll_back(
            promotion, Ruling(ProbationVerdict.START_FAILED, f"it does not start: {crash.category}: {crash.evidence}")
        )
        return True

    def _up(self, promotion: int | None, cause: Cause, why: str) -> None:
        assert self._engine is not None
        self.promotion = None if self.mismatch else promotion
        self._misses = self._steps = 0
        self._requests.engine_id = self._engine.launch.engine_id
        args = self._engine.launch.args
        repairs = self._engines.repairs(self._engine.launch)
        for change in repairs:
            self._progress.say(
                f"the plugin changed {change.name} from {setting(change.before, change.name)}"
                f" to {setting(change.after, change.name)}: {change.reason}"
            )
        self._metrics.engine_answers(up=True)
        self._progress.enter(State.SERVING, cause, why)
        if self.mismatch:  # its arguments are unknown
            return
        self._metrics.serving({**args, **{change.name: change.after for change in repairs}}, promotion)
        try:
            promoted_file.keep_true(self._config, args, why)
        except OSError as error:
            self._progress.say(f"{promoted_file.PROMOTED_FILE}: {error}")

    def _record(self, kind: EventKind, **content: object) -> None:
        """Defers writes that fail: serving must not wait for the journal."""
        if (error := self._operations.record_or_defer(kind, **content)) is not None:
            self._progress.say(str(error))

    # Supervision

    def alive(self) -> bool:
        """Whether the engine's process is running."""
        return self._engine is not None and self._engine.alive()

    def doubtful(self) -> bool:
        """Whether the last probe went unanswered."""
        return self._misses > 0

    def record_again(self) -> None:
        """Makes the serving engine the journal's only engine. Raises JournalError, Superseded."""
        self._engines.record_alone(self._engine)

    def probe(self) -> bool:
        """False if the engine hangs: neither a real token nor scheduler steps since the last probe."""
        assert self._engine is not None
        steps = self._hub.of(self._engine.launch.engine_id).total_steps
        try:
            self._engine.probe(self._probe_timeout_s)
        except Unanswered:
            self._misses = 0 if steps > self._steps else self._misses + 1
        else:
            self._misses = 0
        self._steps = steps
        self._metrics.engine_answers(up=not self._misses)
        return self._misses < _PROBES_TO_HANG

    def restart(self, cause: Cause, why: str) -> None:
        """Handles a crash or hang: kills what is left, counts the crash, starts the current configuration."""
        self._metrics.engine_answers(up=False)
        self._progress.enter(State.RESTORING, cause, why)
        if self._engine is not None:
            try:
                crash = self._engine.crashed("serving", timed_out=cause is Cause.ENGINE_HANGS).crash
            except (NotGoneError, OSError) as error:
                self._progress.say(str(error))
            else:
                self._crashed(self._engine, crash)
        self.bring_up(State.RESTORING, cause, why)

    def _crashed(self, engine: Engine, crash: Crash) -> None:
        self._metrics.crashed(crash, "serving")
        self._progress.say(f"the serving engine crashed: {crash.category}: {crash.evidence}")
        self._engines.learn(engine.launch, crash, started=False)
        self._crashes = [*self._crashes[-99:], (self.promotion, time.monotonic())]
        self._record(EventKind.CRASH, promotion=self.promotion, reason=f"{crash.category}: {crash.evidence}")
        times = [at for promotion, at in self._crashes if promotion == self.promotion]
        ruling = crash_loop(times, time.monotonic(), self._config.promotion.probation)
        if ruling is not None and self.promotion is not None:
            self.roll_back(self.promotion, ruling)

    def replace(self, cause: Cause, why: str) -> None:
        """Drains the engine and starts the current configuration instead."""
        self._progress.enter(State.RESTORING, cause, why)
        try:
            if problem := self.hooks.before_drain(self._drain_is_pointless):
                self._progress.say(problem)
        except JournalError as error:
            self._progress.say(str(error))
        deadline = time.monotonic() + self._config.window.notice
        while time.monotonic() < deadline and not self._drain_is_pointless():
            time.sleep(_POLL_S)
        try:
            self.drained(self._drain_is_pointless)
            self.end(drain=True)
        except (NotGoneError, OSError) as error:
            self._progress.say(str(error))
        self.bring_up(State.RESTORING, cause, why)

    def _drain_is_pointless(self) -> bool:
        return self._requests.stop_sidecar.is_set() or not self.alive()

    def drained(self, interrupted: Callable[[], bool]) -> bool:
        """Waits until vLLM reports no running or waiting requests, within ``engine.drain_timeout_s``.

        Requests can still arrive after the notice, so the count must stay zero for a moment. False if it does not, or
        if vLLM does not report it.
        """
        deadline = time.monotonic() + self._config.engine.drain_timeout_s
        idle_since: float | None = None
        while self._engine is not None and time.monotonic() < deadline and not interrupted():
            count = self._engine.http.requests_in_engine()
            if count is None:
                return False
            idle_since = (idle_since or time.monotonic()) if count == 0 else None
            if idle_since is not None and time.monotonic() - idle_since >= _IDLE_S:
                return True
            time.sleep(_POLL_S)
        return False

    def end(self, *, drain: bool) -> None:
        """Ends the engine. Raises NotGoneError."""
        if self._engine is not None:
            self._engines.end(self._engine, drain=drain)
            self._engine = None

    # Traffic

    def requests(self) -> list[UserRequest]:
        """Real users' requests to the serving engine, as reported by telemetry."""
        return real_requests(self._hub.traffic(self._requests.engine_id))

    def rate(self) -> float | None:
        """Requests/s over the last five minutes; None with less than a minute of telemetry."""
        return serving_rate(self._hub, self._requests.engine_id)

    def record(self) -> Record:
        """Summary of its requests."""
        traffic = self._hub.traffic(self._requests.engine_id)
        gaps = traffic.gaps_after(traffic.since) if traffic is not None else None
        return summarize(real_requests(traffic), self._config.slo, self.rate(), gaps)


def _says_no(crash: Crash) -> bool:
    """Whether vLLM rejected its configuration and would again: it exited with an error, neither killed nor hung.

    With code 0 it did not: its API server ends so when the engine core was killed.
    """
    exited_with_error = crash.exit_code is None or crash.exit_code > 0
    return exited_with_error and crash.category is not Category.TIMEOUT
