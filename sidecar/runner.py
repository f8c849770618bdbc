"""Runs one plan: an engine, its load, its end. What the load means is sidecar.judge's to say."""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sidecar import judge
from sidecar.capacity import Tried, capacity, next_rate
from sidecar.config import Config, Objective, Workload
from sidecar.early_stop import Rules
from sidecar.engine.engine import Engine, EngineCrashed, Launch, any_free_port
from sidecar.engine.fork_server import ForkServer, ForkServerError
from sidecar.engine.http import Unanswered
from sidecar.engine.process_group import Identity, ProcessGroup, marked
from sidecar.journal import EngineRecord, JournalError, Superseded
from sidecar.learning import Learning
from sidecar.live import LiveHub
from sidecar.load import LoadClient, LoadError, LoadResult, LoadTimeoutError, Watch, to_the_end
from sidecar.metrics import Metrics
from sidecar.so_far import Hopeless
from sidecar.telemetry import TelemetryHub
from sidecar.trial import VALIDATING, Change, Plan, Result, Role, Start
from sidecar.trial_engine import NotStartedError, TrialEngines
from vllm_sloguard.crash import Category, Crash
from vllm_sloguard.knobs import Value

LOGS = "logs"
_MOST_LOGS = 100
_PROBE_TIMEOUT_S = 10.0
_LAST_WORDS_S = 0.5
_GOING_DOWN_S = 5.0
# Of the configured rate, where the capacity is the objective and no highest rate is given.
_HIGHEST_RATE = 16.0


class Runner:
    """Starts engines for trials, on a port of their own, and for serving, on the operator's."""

    def __init__(  # noqa: PLR0917 - all that a sidecar consists of
        self,
        config: Config,
        learning: Learning,
        hub: TelemetryHub,
        live: LiveHub,
        metrics: Metrics,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._learning = learning
        self._journal = learning.journal
        self._hub = hub
        self._metrics = metrics
        self._live = live
        logs = config.state / LOGS
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        python, env = config.engine.python, config.engine.env
        self.client = LoadClient(python, logs / "load-client.log", env)
        fork_server = ForkServer(python, {**os.environ, **env}, config.state, logs / "fork-server.log")
        self._engines = TrialEngines(
            config,
            live,
            fork_server if config.engine.forked_trials else None,
            lambda launch, server: self.start(launch, "trial", server),
            # No request is left to wait for, and what is killed leaves less behind than what vLLM shuts down.
            lambda engine: self.end(engine, drain=False),
            say,
        )

    def act_for(self, epoch: int) -> None:
        """Makes live changes in the name of the controller of ``epoch`` from now on."""
        self._live.act_for(epoch)

    def close(self) -> None:
        """Ends the load client, the fork server, and the engine of the last trial."""
        self.client.close()
        self._engines.release()

    def warm_up(self) -> None:
        """Brings up what trials need, without waiting for it. Raises LoadError."""
        self.client.start()
        self._engines.warm_up()

    def release(self) -> None:
        """Ends what was kept for the next trial: its engine, and the fork server. Raises NotGoneError."""
        self._engines.release()

    @property
    def occupied(self) -> bool:
        """Whether an engine is kept for the next trial: what the machine has free is less by that."""
        return self._engines.kept

    def is_cold(self, args: Mapping[str, Any]) -> bool:
        """Whether a trial with ``args`` needs an engine of its own."""
        return not self._engines.reaches(args)

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
            return self._launch(args, "127.0.0.1", any_free_port(), repair=as_it_serves)

        try:
            given = self._engines.get(plan, launch, cancelled, exact=exact)
        except NotStartedError as failed:
            if failed.engine is None:
                return Result(crash=failed.crash), failed.exact
            crash = self._with_report(failed.engine, failed.crash)
            self.learn(failed.engine, crash if plan.role is not Role.UNGUARDED else None)
            return self._told(failed.engine, Result(crash=crash, start=failed.start)), failed.exact
        engine = given.engine
        loads_s = 0.0
        loads: list[tuple[Tried, LoadResult]] = []
        crash: Crash | None = None
        try:
            began = time.monotonic()
            loads = self._loads(engine, plan.role, cancelled)
            loads_s = time.monotonic() - began
        except EngineCrashed as crashed:
            crash = self._with_report(engine, crashed.crash)
        except BaseException:
            self.end(engine, drain=False)
            raise
        lasted = crash is None and (given.exact or not self._engines.undone(engine))
        kept = lasted and self._engines.keep(given, plan)
        stop_s = None if kept else self.end(engine, drain=False)
        # A crash past the guard is no news.
        lesson = crash if plan.role is not Role.UNGUARDED else None
        self.learn(engine, lesson, started=given.start is not Start.LIVE)
        timing = Result(crash=crash, start=given.start, start_s=given.start_s, stop_s=stop_s)
        result = self._told(engine, timing)
        return self._judged(loads, loads_s, result) if loads and lasted else result, given.exact

    def _told(self, engine: Engine, result: Result) -> Result:
        """``result`` with what the plugin said of the start."""
        heard = self._hub.of(engine.launch.engine_id)
        version = heard.memory.vllm_version if heard.memory is not None else ""
        tokens = heard.kv_cache_tokens
        return replace(result, repairs=self.repairs(engine), kv_cache_tokens=tokens, vllm_version=version)

    def learn(self, engine: Engine, crash: Crash | None = None, *, started: bool = True) -> None:
        """Keeps what ``engine`` has shown of its memory, if it can: neither a trial nor the service waits for that."""
        changes = {change.name: change.after for change in self.repairs(engine)}
        args = {name: value for name, value in {**engine.launch.args, **changes}.items() if value is not None}
        heard = self._hub.of(engine.launch.engine_id)
        with suppress(JournalError, OSError):
            if started:
                self._learning.started(args, heard)
            if crash is not None:
                self._learning.crashed(args, heard, crash)

    def repairs(self, engine: Engine) -> tuple[Change, ...]:
        """What the plugin has changed inside ``engine``; values as text where they are no numbers."""
        report = self._hub.of(engine.launch.engine_id).repair
        changes = report.changes if report is not None else ()
        return tuple(Change(c.name, _value(c.from_value), _value(c.to_value), c.reason, (*c.rules,)) for c in changes)

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
                violation=judge.least_violation(ending.at_least, slo),
                value=judge.value(ending.at_least, objective, tried) if objective is Objective.CAPACITY else None,
                measurement=ending.at_least,
                tried=tried if objective is Objective.CAPACITY else (),
                stopped=ending.why,
            )
        measurement = judge.measure(loads[0][1], slo)
        reached = capacity(tried)
        best = next((load for rate, load in loads if rate.rate == reached), loads[0][1])
        return replace(
            timing,
            violation=judge.violation(measurement, slo),
            value=judge.value(measurement, objective, tried),
            measurement=measurement,
            scores=judge.scores(best, slo, objective),
            tried=tried if objective is Objective.CAPACITY else (),
        )

    def _loads(self, engine: Engine, role: Role, cancelled: Callable[[], bool]) -> list[tuple[Tried, LoadResult]]:
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
            changes = {"rate": rate, "seed": workload.seed + len(done)}
            changes |= {"warmup_requests": 0} if done else {}
            load = self._load(engine, workload.model_copy(update=changes), watch, cancelled)
            met = not isinstance(load.ending, Hopeless) and judge.violation(judge.measure(load, slo), slo) == 0
            done.append((Tried(rate, met), load))
            if self._config.objective is not Objective.CAPACITY:
                break
        return done

    def _load(self, engine: Engine, workload: Workload, watch: Watch, cancelled: Callable[[], bool]) -> LoadResult:
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

    def serving_launch(self, args: Mapping[str, Any]) -> Launch:
        """A start on the operator's own host and port."""
        engine = self._config.engine
        launch = self._launch(args, engine.host, engine.port, repair=True)
        return replace(launch, drain_timeout_s=engine.drain_timeout_s)

    def _launch(self, args: Mapping[str, Any], host: str, port: int, *, repair: bool) -> Launch:
        engine_id = uuid.uuid4().hex[:12]
        engine = self._config.engine
        env = {
            **engine.env,
            "SLOGUARD_SOCKET": str(self._config.socket),
            "SLOGUARD_REPAIR": "on" if repair else "off",
            "SLOGUARD_LEARNED": str(self._learning.path),
            "SLOGUARD_IMPORTS": str(self._config.state),
            "SLOGUARD_WORKLOAD_MAX_LEN": str(self._config.workload.longest_request_tokens),
        }
        log = self._config.state / LOGS / f"engine-{engine_id}.log"
        return Launch(engine_id, engine.python, self._config.model, dict(args), host, port, env, log)

    def start(self, launch: Launch, role: str, fork_server: ForkServer | None = None) -> Engine:
        """Starts an engine; the journal knows of it before and after, so that it can always be found again."""
        self._expect(launch, role)
        self._prune_logs()
        # To serve comes before to record: a full disk stops trials, not the service.
        try:
            self._journal.engine_starting(launch.engine_id, role, known(launch))
        except JournalError:
            if role != "serving":
                raise
        try:
            engine = Engine.start(launch, fork_server)
        except (EngineCrashed, ForkServerError, OSError):
            with suppress(JournalError):
                self._journal.engine_gone(launch.engine_id)
            raise
        try:
            self._journal.engine_started(engine.group.identity)
        except Superseded:
            engine.group.kill()
            raise
        except JournalError:
            if role != "serving":
                engine.group.kill()
                raise
        return engine

    def _expect(self, launch: Launch, role: str) -> None:
        """Listens to an engine from now on."""
        cores = launch.args.get("data_parallel_size", 1)
        self._hub.expect(launch.engine_id)
        self._live.expect(launch.engine_id, cores if isinstance(cores, int) else 1)
        self._metrics.traffic(launch.engine_id, role)

    def _prune_logs(self) -> None:
        logs = sorted((self._config.state / LOGS).glob("engine-*.log"), key=lambda log: log.stat().st_mtime)
        for log in logs[:-_MOST_LOGS]:
            log.unlink(missing_ok=True)

    def end(self, engine: Engine, *, drain: bool) -> float:
        """Ends an engine, sees it gone, and returns the seconds taken."""
        began = time.monotonic()
        if drain:
            engine.stop()
        else:
            engine.group.kill()
        with suppress(JournalError):  # the next start will find that it is gone
            self._journal.engine_gone(engine.launch.engine_id)
        return time.monotonic() - began

    def adopt(self, record: EngineRecord, args: Mapping[str, Any]) -> Engine | None:
        """The engine of ``record``, if an earlier sidecar started it just as this one would start ``args`` now."""
        log = Path(record.launch["log"])
        launch = replace(self.serving_launch(args), engine_id=record.identity.engine_id, log=log)
        # A log is read and cut: only ever one of the state folder's.
        own = log.resolve().parent == (self._config.state / LOGS).resolve()
        if record.role != "serving" or record.launch != known(launch) or not own:
            return None
        self._expect(launch, record.role)
        return Engine.adopt(launch, record.identity)

    def record_alone(self, engine: Engine | None) -> None:
        """Makes the journal say that ``engine`` runs, for serving, and no other. Raises JournalError."""
        recorded = {record.identity.engine_id for record in self._journal.engines()}
        for engine_id in recorded - ({engine.launch.engine_id} if engine is not None else set()):
            self._journal.engine_gone(engine_id)
        if engine is not None:
            if engine.launch.engine_id not in recorded:
                self._journal.engine_starting(engine.launch.engine_id, "serving", known(engine.launch))
            self._journal.engine_started(engine.group.identity)

    def end_orphans(self, keep: str = "") -> list[str]:
        """Kills the engines that an earlier sidecar left running, but the one named ``keep``; returns their ids."""
        ended: list[str] = []
        for record in self._journal.engines():
            identity = record.identity
            if identity.engine_id == keep:
                continue
            # The process may have been started without its id having been written: its mark finds it.
            anywhere = Identity(identity.pid or -1, identity.started_at, identity.engine_id)
            ProcessGroup(anywhere).kill()
            with suppress(JournalError):  # the next start will find that it is gone
                self._journal.engine_gone(identity.engine_id)
            ended.append(identity.engine_id)
        # On a full disk one may have been started that the journal never heard of.
        for engine_id in marked("SLOGUARD_SOCKET", str(self._config.socket)) - {keep, *ended}:
            ProcessGroup(Identity(-1, 0.0, engine_id)).kill()
            ended.append(engine_id)
        return ended


def _silent(engine: Engine) -> EngineCrashed:
    """The crash of an engine that does not answer: it hangs, or is still on its way down after its core has died."""
    deadline = time.monotonic() + _GOING_DOWN_S
    while engine.alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    return engine.crashed("serving", timed_out=engine.alive())


def known(launch: Launch) -> dict[str, Any]:
    """A launch as the journal keeps it: all that makes a difference; of the environment, with its secrets, a digest."""
    env = hashlib.sha256(json.dumps(sorted(launch.env.items())).encode()).hexdigest()[:16]
    return {
        "python": launch.python,
        "model": launch.model,
        "args": dict(launch.args),
        "host": launch.host,
        "port": launch.port,
        "drain_timeout_s": launch.drain_timeout_s,
        "env": env,
        "log": str(launch.log),
    }


def _value(text: str) -> Value | None:
    """A value that came as text."""
    try:
        value = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text
    return value if value is None or isinstance(value, bool | int | float | str) else text
