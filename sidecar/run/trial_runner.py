"""Runs one plan: starts an engine, sends the loads, stops it. sidecar.run.judging interprets the results."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from sidecar.config.schema import Config, Workload
from sidecar.engine.engine import Engine, EngineCrashed, Launch
from sidecar.engine.live_knobs import LiveHub
from sidecar.measure.load_client import LoadClient, LoadError, LoadTimeoutError
from sidecar.measure.load_schedule import Loads, LoadSchedule, RateLoad, WarmStartLoad
from sidecar.measure.requests import LoadResult, StopRule
from sidecar.observe.telemetry import TelemetryHub
from sidecar.record.trial import Plan, Role, StartKind
from sidecar.run.engine_manager import LOGS, EngineManager
from sidecar.run.engine_reuse import NotStartedError, ReadyEngine, TrialEngines
from sidecar.run.raw_trial import EngineRun, PluginCrash, PluginReport, RawTrial
from vllm_sloguard.agent.engine_http import Unanswered
from vllm_sloguard.crash import Crash

_PROBE_TIMEOUT_S = 10.0
_LAST_WORDS_S, _GOING_DOWN_S = 0.5, 5.0


class TrialRunner:
    """Runs trials one at a time, and keeps the load client and an engine for the next one."""

    def __init__(
        self, config: Config, engines: EngineManager, hub: TelemetryHub, live: LiveHub, say: Callable[[str], None]
    ) -> None:
        self._config = config
        self._engines = engines
        self._hub = hub
        self._live = live
        log = config.state / LOGS / "load-client.log"
        self.client = LoadClient(config.engine.python, log, config.engine.env, engines.load_generator())
        self._trial_engines = TrialEngines(config, live, engines, say)

    def act_for(self, epoch: int) -> None:
        """Controls engines as the controller of ``epoch`` from now on. Raises AgentLost."""
        self._live.act_for(epoch)
        self._engines.act_for(epoch)

    def close(self) -> None:
        """Stops the load client, and everything kept for the next trial."""
        self.client.close()
        self.release()

    def warm_up(self) -> None:
        """Starts what trials need without waiting for it. Raises LoadError."""
        self.client.start()
        self._trial_engines.warm_up()

    def release(self) -> None:
        """Stops everything kept for the next trial except the load client. Raises NotGoneError."""
        self._trial_engines.release()

    @property
    def occupied(self) -> bool:
        """Whether an engine is kept for the next trial: it takes memory that the machine reports as used."""
        return self._trial_engines.kept

    def is_cold(self, args: Mapping[str, Any]) -> bool:
        """Whether a trial with ``args`` needs a new engine."""
        return not self._trial_engines.reaches(args)

    def run(
        self, plan: Plan, schedule: LoadSchedule, cancelled: Callable[[], bool], *, warm_start: bool = False
    ) -> RawTrial:
        """Runs ``plan``, after a ``warm_start`` of an engine that is not measured.

        Raises LoadError when the load client itself fails, Cancelled.
        """
        self.warm_up()
        if warm_start:
            began = time.monotonic()
            warming = self._warm_start(plan, WarmStartLoad(schedule), cancelled)
            if warming.crash is not None:
                return RawTrial((warming,))
            warm_start_s = time.monotonic() - began
            return RawTrial((self._attempt(plan, schedule, cancelled, exact=True),), warm_start_s)
        first = self._attempt(plan, schedule, cancelled, exact=False)
        if first.conclusive:
            return RawTrial((first,))
        # The raised start limits, or state left by earlier trials, may be the cause: repeat on a new engine.
        return RawTrial((first, self._attempt(plan, schedule, cancelled, exact=True)))

    def _warm_start(self, plan: Plan, loads: WarmStartLoad, cancelled: Callable[[], bool]) -> EngineRun:
        """A start that fills the caches, forked if possible; a crash counts if the measured starts would share it."""
        run = self._attempt(plan, loads, cancelled, exact=True, measured=False)
        if run.crash is None or run.start is StartKind.ORDINARY:
            return run
        return self._attempt(plan, loads, cancelled, exact=True)

    def _attempt(
        self, plan: Plan, schedule: Loads, cancelled: Callable[[], bool], *, exact: bool, measured: bool = True
    ) -> EngineRun:
        def launch(args: Mapping[str, Any]) -> Launch:
            # The guard has already repaired a plan, so it runs unchanged; the incumbent runs as it does in service.
            as_it_serves = plan.role in (Role.BASELINE, Role.REFERENCE)
            return self._engines.trial_launch(args, repair=as_it_serves)

        try:
            ready = self._trial_engines.get(plan, launch, cancelled, exact=exact, measured=measured)
        except NotStartedError as failed:
            if failed.engine is None:
                return EngineRun(None, StartKind.ORDINARY, failed.exact, crash=failed.crash)
            report = self._report(failed.engine, failed.crash)
            return EngineRun(failed.engine.launch, failed.start, failed.exact, crash=failed.crash, report=report)
        return self._loaded(ready, plan, schedule, cancelled)

    def _loaded(self, ready: ReadyEngine, plan: Plan, schedule: Loads, cancelled: Callable[[], bool]) -> EngineRun:
        """Sends the loads to a running engine, then stops it unless the next trial can use it."""
        engine = ready.engine
        loads: list[RateLoad] = []
        crash: Crash | None = None
        began = time.monotonic()
        try:
            while (workload := schedule.next_load(loads, warm=ready.start is StartKind.LIVE)) is not None:
                load = self._load(engine, workload, schedule.stop_rule(workload.rate), cancelled)
                loads.append(RateLoad(workload.rate, load))
        except EngineCrashed as crashed:
            crash = crashed.crash
        except BaseException:
            self._engines.end(engine, drain=False)
            raise
        loads_s = time.monotonic() - began
        report = self._report(engine, crash)
        held = crash is not None or ready.exact or not self._trial_engines.undone(engine)
        kept = crash is None and held and self._trial_engines.keep(ready, plan)
        stop_s = None if kept else self._engines.end(engine, drain=False)
        return EngineRun(
            engine.launch,
            ready.start,
            ready.exact,
            ready.start_s,
            tuple(loads),
            loads_s,
            stop_s,
            crash,
            held,
            report,
        )

    def _report(self, engine: Engine, crash: Crash | None) -> PluginReport:
        if crash is not None:
            time.sleep(_LAST_WORDS_S)  # a crash report may still be in flight
        telemetry = self._hub.of(engine.launch.engine_id)
        return PluginReport(
            self._engines.repairs(engine.launch),
            telemetry.kv_cache_tokens,
            telemetry.memory.vllm_version if telemetry.memory is not None else "",
            tuple(PluginCrash(c.exception_type, c.message, c.context) for c in telemetry.crashes),
        )

    def _load(
        self, engine: Engine, workload: Workload, stop_rule: StopRule, cancelled: Callable[[], bool]
    ) -> LoadResult:
        """The load; an engine that exits or hangs meanwhile is a crash, whatever the client reports."""
        config = self._config
        try:
            model = engine.http.model()
            load = self.client.run(workload, engine.http.base_url, model, config.model, cancelled, stop_rule=stop_rule)
        except (LoadTimeoutError, Unanswered):
            raise _silent(engine) from None
        except LoadError:
            if not engine.alive():
                raise engine.crashed("serving") from None
            raise
        self._probe_after(engine)
        return load

    def _probe_after(self, engine: Engine) -> None:
        """A dead engine's server may still answer when the client is done, so request one more token."""
        try:
            engine.probe(_PROBE_TIMEOUT_S)
        except Unanswered:
            raise _silent(engine) from None


def _silent(engine: Engine) -> EngineCrashed:
    """The crash of an engine that does not respond: it hangs, or is still shutting down after its core died."""
    deadline = time.monotonic() + _GOING_DOWN_S
    while engine.alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    return engine.crashed("serving", timed_out=engine.alive())
