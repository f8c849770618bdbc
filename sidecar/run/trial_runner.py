"""Runs one plan: an engine, its load, its end. What the load means is sidecar.measure.verdict's to say."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sidecar.config.schema import Config, Objective, Workload
from sidecar.engine.engine import Engine, EngineCrashed, Launch
from sidecar.engine.http import Unanswered
from sidecar.engine.live_knobs import LiveHub
from sidecar.measure import verdict
from sidecar.measure.capacity_search import Tried, capacity, next_rate
from sidecar.measure.early_stop import Rules
from sidecar.measure.load_client import LoadClient, LoadError, LoadTimeoutError
from sidecar.measure.measurement import measure
from sidecar.measure.partial_load import Hopeless
from sidecar.measure.requests import LoadResult, StopRule, to_the_end
from sidecar.observe.telemetry import TelemetryHub
from sidecar.record.trial import VALIDATING, Plan, Result, Role, StartKind
from sidecar.run.engine_manager import LOGS, EngineManager
from sidecar.run.engine_reuse import Given, NotStartedError, TrialEngines
from vllm_sloguard.crash import Category, Crash

_PROBE_TIMEOUT_S = 10.0
_LAST_WORDS_S, _GOING_DOWN_S = 0.5, 5.0
# Of the configured rate, where the capacity is the objective and no highest rate is given.
_HIGHEST_RATE = 16.0


class TrialRunner:
    """Runs trials, one at a time, and keeps what the next one can use: the load client, and an engine."""

    def __init__(
        self, config: Config, engines: EngineManager, hub: TelemetryHub, live: LiveHub, say: Callable[[str], None]
    ) -> None:
        self._config = config
        self._engines = engines
        self._hub = hub
        self._live = live
        log = config.state / LOGS / "load-client.log"
        self.client = LoadClient(config.engine.python, log, config.engine.env)
        self._trial_engines = TrialEngines(config, live, engines, say)

    def act_for(self, epoch: int) -> None:
        """Makes live changes in the name of the controller of ``epoch`` from now on."""
        self._live.act_for(epoch)

    def close(self) -> None:
        """Ends the load client, and what was kept for the next trial."""
        self.client.close()
        self.release()

    def warm_up(self) -> None:
        """Brings up what trials need, without waiting for it. Raises LoadError."""
        self.client.start()
        self._trial_engines.warm_up()

    def release(self) -> None:
        """Ends what was kept for the next trial, but the load client. Raises NotGoneError."""
        self._trial_engines.release()

    @property
    def occupied(self) -> bool:
        """Whether an engine is kept for the next trial: what the machine has free is less by that."""
        return self._trial_engines.kept

    def is_cold(self, args: Mapping[str, Any]) -> bool:
        """Whether a trial with ``args`` needs an engine of its own."""
        return not self._trial_engines.reaches(args)

    def run(self, plan: Plan, cancelled: Callable[[], bool]) -> Result:
        """One trial. A crash is a result. Raises LoadError when the client itself can't measure, Cancelled."""
        self.warm_up()
        result, exact = self._attempt(plan, cancelled, exact=False)
        if exact or (result.crash is None and result.measurement is not None):
            return result
        # It may have been the ceilings, or what the trials before have left: the configuration itself is asked.
        return self._attempt(plan, cancelled, exact=True)[0]

    def _attempt(self, plan: Plan, cancelled: Callable[[], bool], *, exact: bool) -> tuple[Result, bool]:
        """The result, and whether it is of an engine with the plan's very arguments; there is no measurement where a
        live change did not last.
        """

        def launch(args: Mapping[str, Any]) -> Launch:
            # What the guard has passed runs as it is; the incumbent as it serves.
            as_it_serves = plan.role in (Role.BASELINE, Role.REFERENCE)
            return self._engines.trial_launch(args, repair=as_it_serves)

        try:
            given = self._trial_engines.get(plan, launch, cancelled, exact=exact)
        except NotStartedError as failed:
            if failed.engine is None:
                return Result(crash=failed.crash), failed.exact
            crash = self._with_report(failed.engine, failed.crash)
            self._engines.learn(failed.engine, crash if plan.role is not Role.UNGUARDED else None)
            return self._told(failed.engine, Result(crash=crash, start=failed.start)), failed.exact
        engine = given.engine
        loads_s = 0.0
        loads: list[tuple[Tried, LoadResult]] = []
        crash: Crash | None = None
        try:
            began = time.monotonic()
            loads = self._loads(given, plan.role, cancelled)
            loads_s = time.monotonic() - began
        except EngineCrashed as crashed:
            crash = self._with_report(engine, crashed.crash)
        except BaseException:
            self._engines.end(engine, drain=False)
            raise
        lasted = crash is None and (given.exact or not self._trial_engines.undone(engine))
        kept = lasted and self._trial_engines.keep(given, plan)
        stop_s = None if kept else self._engines.end(engine, drain=False)
        # A crash past the guard is no news.
        lesson = crash if plan.role is not Role.UNGUARDED else None
        self._engines.learn(engine, lesson, started=given.start is not StartKind.LIVE)
        timing = Result(crash=crash, start=given.start, start_s=given.start_s, stop_s=stop_s)
        result = self._told(engine, timing)
        return self._judged(loads, loads_s, result) if loads and lasted else result, given.exact

    def _told(self, engine: Engine, result: Result) -> Result:
        """``result`` with what the plugin said of the start."""
        heard = self._hub.of(engine.launch.engine_id)
        version = heard.memory.vllm_version if heard.memory is not None else ""
        tokens = heard.kv_cache_tokens
        return replace(result, repairs=self._engines.repairs(engine), kv_cache_tokens=tokens, vllm_version=version)

    def _judged(self, loads: list[tuple[Tried, LoadResult]], loads_s: float, timing: Result) -> Result:
        """The first load, at the rate of the configuration, gives the verdict; the best of them the scores."""
        slo, objective = self._config.slo, self._config.objective
        warm_up = loads[0][1].warm_up  # the later ones find a warm engine
        timing = replace(
            timing, warmup_s=warm_up.seconds, warmup_requests=warm_up.requests, load_s=loads_s - warm_up.seconds
        )
        tried = tuple(rate for rate, _ in loads)
        ending = loads[0][1].ending
        if isinstance(ending, Hopeless):
            return replace(
                timing,
                violation=verdict.least_violation(ending.at_least, slo),
                value=verdict.value(ending.at_least, objective, tried) if objective is Objective.CAPACITY else None,
                measurement=ending.at_least,
                tried=tried if objective is Objective.CAPACITY else (),
                stopped=ending.why,
            )
        measurement = measure(loads[0][1], slo)
        reached = capacity(tried)
        best = next((load for rate, load in loads if rate.rate == reached), loads[0][1])
        return replace(
            timing,
            violation=verdict.violation(measurement, slo),
            value=verdict.value(measurement, objective, tried),
            measurement=measurement,
            scores=verdict.scores(best, slo, objective),
            tried=tried if objective is Objective.CAPACITY else (),
        )

    def _loads(self, given: Given, role: Role, cancelled: Callable[[], bool]) -> list[tuple[Tried, LoadResult]]:
        """One load, or for the capacity as many as it takes to find it; those of a validation are long enough."""
        workload, slo = self._config.workload, self._config.slo
        if role in VALIDATING:
            requests = max(workload.fixed_requests, self._config.promotion.requests_a_start)
            workload = workload.model_copy(update={"requests": requests})
        rules = Rules(slo, workload, self._config.promotion.confidence, thorough=role is Role.BASELINE)
        watch = to_the_end if role in VALIDATING else rules
        highest = workload.highest_rate or _HIGHEST_RATE * workload.rate
        done: list[tuple[Tried, LoadResult]] = []
        while (rate := next_rate([tried for tried, _ in done], workload.rate, highest)) is not None:
            # Prompts that are new to the engine: those of the load before are in its prefix cache.
            changes: dict[str, float] = {"rate": rate, "seed": workload.seed + len(done)}
            if done or given.start is StartKind.LIVE:  # the load before has warmed the engine
                changes["warmup_requests"] = 0
            load = self._load(given.engine, workload.model_copy(update=changes), watch, cancelled)
            met = not isinstance(load.ending, Hopeless) and verdict.violation(measure(load, slo), slo) == 0
            done.append((Tried(rate, met), load))
            if self._config.objective is not Objective.CAPACITY:
                break
        return done

    def _load(self, engine: Engine, workload: Workload, watch: StopRule, cancelled: Callable[[], bool]) -> LoadResult:
        """The load; an engine that ends or hangs meanwhile is a crash, whatever the client says."""
        config = self._config
        try:
            model = engine.http.model()
            load = self.client.run(workload, engine.http.base_url, model, config.model, cancelled, watch=watch)
        except (LoadTimeoutError, Unanswered):
            raise _silent(engine) from None
        except LoadError:
            if not engine.alive():
                raise engine.crashed("serving") from None
            raise
        self._probe_after(engine)
        return load

    def _probe_after(self, engine: Engine) -> None:
        """A dead engine's server may still be shutting down when the client is back: ask for one more token."""
        try:
            engine.probe(_PROBE_TIMEOUT_S)
        except Unanswered:
            raise _silent(engine) from None

    def _with_report(self, engine: Engine, crash: Crash) -> Crash:
        """Where the log does not say why, what the plugin reported may."""
        time.sleep(_LAST_WORDS_S)
        reports = self._hub.of(engine.launch.engine_id).crashes
        if crash.category is not Category.ENGINE_DEATH or not reports:
            return crash
        first = reports[0]
        evidence = f"{first.exception_type}: {first.message} ({first.context})"
        return replace(crash, evidence=" ".join(evidence.split())[:500])


def _silent(engine: Engine) -> EngineCrashed:
    """The crash of an engine that does not answer: it hangs, or is still on its way down after its core has died."""
    deadline = time.monotonic() + _GOING_DOWN_S
    while engine.alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    return engine.crashed("serving", timed_out=engine.alive())
