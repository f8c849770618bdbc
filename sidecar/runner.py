"""Runs one plan: a fresh engine, its load, its end. Every I/O of a trial is here; what it means is sidecar.judge's."""

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sidecar import judge
from sidecar.config import Config
from sidecar.engine.engine import Cancelled, Engine, EngineCrashed, Launch, any_free_port
from sidecar.engine.http import Unanswered
from sidecar.engine.process_group import Identity, ProcessGroup
from sidecar.journal import EngineRecord, Journal
from sidecar.load import LoadClient, LoadError, LoadResult, LoadTimeoutError
from sidecar.metrics import Metrics
from sidecar.telemetry import TelemetryHub
from sidecar.trial import Plan, Result, Role
from vllm_sloguard.crash import Category, Crash

LOGS = "logs"
_PROBE_TIMEOUT_S = 10.0
_LAST_WORDS_S = 0.5


class Runner:
    """Starts engines for trials, on a port of their own, and for serving, on the operator's."""

    def __init__(self, config: Config, journal: Journal, hub: TelemetryHub, metrics: Metrics) -> None:
        self._config = config
        self._journal = journal
        self._hub = hub
        self._metrics = metrics
        logs = config.state / LOGS
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.client = LoadClient(config.engine.python, logs / "load-client.log")

    def close(self) -> None:
        """Ends the load client."""
        self.client.close()

    def run(self, plan: Plan, cancelled: Callable[[], bool]) -> Result:
        """One trial. A crash is a result. Raises LoadError when the client itself can't measure, Cancelled."""
        self.client.start()
        launch = self._launch(plan.args, "127.0.0.1", any_free_port(), guarded=plan.role is not Role.UNGUARDED)
        try:
            engine = self.start(launch, "trial")
        except EngineCrashed as crashed:
            return Result(crash=crashed.crash)
        start_s: float | None = None
        load_s: float | None = None
        load: LoadResult | None = None
        crash: Crash | None = None
        try:
            start_s = engine.wait_ready(self._config.engine.start_timeout_s, cancelled)
            began = time.monotonic()
            load = self._load(engine, cancelled)
            load_s = time.monotonic() - began
        except EngineCrashed as crashed:
            crash = self._with_report(engine, crashed.crash)
        except (Cancelled, LoadError):
            self.end(engine, drain=False)
            raise
        stop_s = self.end(engine, drain=True)
        kv_cache_tokens = self._hub.of(launch.engine_id).kv_cache_tokens
        timing = Result(kv_cache_tokens=kv_cache_tokens, start_s=start_s, load_s=load_s, stop_s=stop_s, crash=crash)
        return timing if load is None else self._judged(load, timing)

    def _judged(self, load: LoadResult, timing: Result) -> Result:
        slo, objective = self._config.slo, self._config.objective
        measurement = judge.measure(load, slo)
        return replace(
            timing,
            violation=judge.violation(measurement, slo),
            value=judge.value(measurement, objective),
            measurement=measurement,
            scores=judge.scores(load, slo, objective),
        )

    def _load(self, engine: Engine, cancelled: Callable[[], bool]) -> LoadResult:
        """The load; an engine that ends or hangs meanwhile is a crash, whatever the client says."""
        config = self._config
        try:
            model = engine.http.model()
            load = self.client.run(config.workload, engine.http.base_url, model, config.model, cancelled)
        except (LoadTimeoutError, Unanswered):
            raise engine.crashed("serving", timed_out=engine.alive()) from None
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
            raise engine.crashed("serving", timed_out=engine.alive()) from None

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
        launch = self._launch(args, engine.host, engine.port, guarded=True)
        return replace(launch, drain_timeout_s=engine.drain_timeout_s)

    def _launch(self, args: Mapping[str, Any], host: str, port: int, *, guarded: bool) -> Launch:
        engine_id = uuid.uuid4().hex[:12]
        engine = self._config.engine
        env = {
            **engine.env,
            "SLOGUARD_SOCKET": str(self._config.socket),
            "SLOGUARD_REPAIR": "on" if guarded else "off",
            "SLOGUARD_WORKLOAD_MAX_LEN": str(self._config.workload.longest_request_tokens),
        }
        log = self._config.state / LOGS / f"engine-{engine_id}.log"
        return Launch(engine_id, engine.python, self._config.model, dict(args), host, port, env, log)

    def start(self, launch: Launch, role: str) -> Engine:
        """Starts an engine; the journal knows of it before and after, so that it can always be found again."""
        self._hub.expect(launch.engine_id)
        self._metrics.traffic(launch.engine_id, role)
        known = {"args": dict(launch.args), "host": launch.host, "port": launch.port, "log": str(launch.log)}
        self._journal.engine_starting(launch.engine_id, role, known)
        try:
            engine = Engine.start(launch)
        except (EngineCrashed, OSError):
            self._journal.engine_gone(launch.engine_id)
            raise
        self._journal.engine_started(engine.group.identity)
        return engine

    def end(self, engine: Engine, *, drain: bool) -> float:
        """Ends an engine, sees it gone, and returns the seconds taken."""
        began = time.monotonic()
        if drain:
            engine.stop()
        else:
            engine.group.kill()
        self._journal.engine_gone(engine.launch.engine_id)
        return time.monotonic() - began

    def adopt(self, record: EngineRecord) -> Engine:
        """The engine of ``record``, started by an earlier sidecar."""
        known = record.launch
        launch = replace(self.serving_launch(known["args"]), engine_id=record.identity.engine_id, host=known["host"])
        self._hub.expect(launch.engine_id)
        self._metrics.traffic(launch.engine_id, record.role)
        return Engine.adopt(replace(launch, port=known["port"], log=Path(known["log"])), record.identity)

    def end_orphans(self, keep: str = "") -> list[str]:
        """Kills the engines that an earlier sidecar left running, but the one named ``keep``; returns their ids."""
        ended: list[str] = []
        for record in self._journal.engines():
            identity = record.identity
            if identity.engine_id == keep:
                continue
            # The process may have been started without its id having been written: its mark finds it.
            anywhere = Identity(identity.pid or -1, min(identity.started_at, time.time()), identity.engine_id)
            ProcessGroup(anywhere).kill()
            self._journal.engine_gone(identity.engine_id)
            ended.append(identity.engine_id)
        return ended
