"""What Prometheus reads: /metrics, and beside it /ready for load balancers."""

import math
import threading
from collections.abc import Mapping
from itertools import product
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from sidecar.config import Config, Slo
from sidecar.engine.engine import port_owner
from sidecar.operations import WindowOutcome
from sidecar.probation import Verdict
from sidecar.promotion import Decision, Outcome, baseline
from sidecar.states import Cause, State
from sidecar.telemetry import EngineTelemetry
from sidecar.trial import Status, Trial
from vllm_sloguard import __version__
from vllm_sloguard.crash import Category, Crash
from vllm_sloguard.wire import telemetry_pb2 as pb

_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_P99S = ("ttft", "itl", "e2e")
_TRAFFIC = ("serving", "trial")
# A series that exists before its first event shows that event as a rise.
_FINISH_REASONS = ("stop", "length", "abort", "error")
_OTHER_REASON = "other"
# A client that says nothing does not keep a thread.
_PATIENCE_S = 10.0


class Metrics:
    """Every metric of the sidecar, in a registry of its own."""

    def __init__(self, config: Config) -> None:
        self.registry = CollectorRegistry()
        self._config = config
        self._ready = False
        self._traffic: dict[str, str] = {}
        self._lock = threading.Lock()
        self._define_window()
        self._define_trials()
        self._define_engine(config.slo)

    def _define_window(self) -> None:
        reg = self.registry
        Info("sloguard_build", "Version of the sidecar.", registry=reg).info({"version": __version__})
        self.state = Enum("sloguard_state", "What the sidecar is doing.", states=[str(s) for s in State], registry=reg)
        self.reason = Info("sloguard_state_reason", "Why it is in its state, in one word of a list.", registry=reg)
        self.epoch = Gauge("sloguard_controller_epoch", "Number of this controller; it only grows.", registry=reg)
        self.paused = Gauge("sloguard_paused", "Whether the operator lets no windows open.", registry=reg)
        self.windows = Counter("sloguard_windows", "Windows, by how they ended.", ["outcome"], registry=reg)
        for outcome in WindowOutcome:
            self.windows.labels(str(outcome))
        self.probation_remaining = Gauge(
            "sloguard_probation_remaining_seconds", "Time left of a promotion's probation; 0 without.", registry=reg
        )
        self.rollbacks = Counter(
            "sloguard_rollbacks", "Promotions that were taken back by themselves.", ["verdict"], registry=reg
        )
        for verdict in Verdict:
            if verdict not in (Verdict.GOES_ON, Verdict.PASSED):
                self.rollbacks.labels(str(verdict))
        self.window_remaining = Gauge(
            "sloguard_window_remaining_seconds", "Time left in the window; 0 outside.", registry=reg
        )
        self.budget_remaining = Gauge(
            "sloguard_budget_remaining_trials", "Trials that the run may still try.", registry=reg
        )
        self.decisions = Counter("sloguard_decisions", "Runs that were decided, by outcome.", ["outcome"], registry=reg)
        for outcome in Outcome:
            self.decisions.labels(_word(outcome))
        self.seconds = Gauge(
            "sloguard_last_duration_seconds",
            "How long the last drain and the last restore took.",
            ["step"],
            registry=reg,
        )
        self.serving_info = Info("sloguard_serving_configuration", "Engine arguments of what is serving.", registry=reg)

    def _define_trials(self) -> None:
        reg = self.registry
        self.trials = Counter("sloguard_trials", "Trials, by what became of them.", ["status"], registry=reg)
        for status in Status:
            if status is not Status.RUNNING:
                self.trials.labels(str(status))
        self.crashes = Counter(
            "sloguard_crashes", "Crashes of engines.", ["category", "phase", "traffic"], registry=reg
        )
        for category, phase, traffic in product(Category, ("starting", "serving"), _TRAFFIC):
            self.crashes.labels(str(category), phase, traffic)
        self.repairs = Counter("sloguard_repairs", "Arguments changed by the repair pass.", ["argument"], registry=reg)
        self.trial_seconds = Counter("sloguard_trial_seconds", "Where the trials' time went.", ["part"], registry=reg)
        for part in ("start", "warmup", "load", "stop"):
            self.trial_seconds.labels(part)
        self.p99 = Gauge(
            "sloguard_trial_p99_seconds", "99th percentile latencies of a trial.", ["latency", "trial"], registry=reg
        )
        self.objective = Gauge(
            "sloguard_trial_objective",
            "Objective of a trial: requests/s, or minus milliseconds.",
            ["trial"],
            registry=reg,
        )
        self.kv_tokens = Gauge(
            "sloguard_kv_cache_tokens",
            "KV cache of the last engine: guard's estimate, vLLM's report.",
            ["source"],
            registry=reg,
        )

    def _define_engine(self, slo: Slo) -> None:
        reg = self.registry
        self.engine_up = Gauge("sloguard_engine_up", "Whether the serving engine runs and answers.", registry=reg)
        self.running = Gauge(
            "sloguard_engine_running_requests", "Requests running in the engine.", ["traffic"], registry=reg
        )
        self.waiting = Gauge(
            "sloguard_engine_waiting_requests", "Requests waiting in the engine.", ["traffic"], registry=reg
        )
        self.kv_usage = Gauge(
            "sloguard_engine_kv_cache_usage_ratio", "KV cache in use, 0 to 1.", ["traffic"], registry=reg
        )
        self.preemptions = Counter("sloguard_engine_preemptions", "Requests preempted.", ["traffic"], registry=reg)
        self.requests = Counter("sloguard_requests", "Requests that ended.", ["traffic", "finish_reason"], registry=reg)
        self.limit = Gauge("sloguard_slo_limit_seconds", "Limits of the SLO.", ["latency"], registry=reg)
        limits_ms = {"ttft": slo.ttft_p99_ms, "itl": slo.itl_p99_ms, "e2e": slo.e2e_p99_ms}
        self.latency: dict[str, Histogram] = {}
        for name, limit_ms in limits_ms.items():
            if limit_ms is not None:
                self.limit.labels(name).set(limit_ms / 1000)
            # A limit that is a bucket boundary makes its attainment exact.
            own = () if limit_ms is None else (limit_ms / 1000,)
            buckets: list[float] = sorted({*_BUCKETS_S, *own})
            self.latency[name] = Histogram(
                f"sloguard_request_{name}_seconds", _LATENCIES[name], ["traffic"], buckets=buckets, registry=reg
            )
        Gauge("sloguard_slo_error_rate_limit_ratio", "Share of requests that may fail.", registry=reg).set(
            slo.error_rate
        )
        self.dropped = Gauge(
            "sloguard_telemetry_dropped_events",
            "Events that the engine's plugin has dropped.",
            ["traffic"],
            registry=reg,
        )
        self.hook_errors = Gauge(
            "sloguard_plugin_hook_errors", "Exceptions caught in the engine's plugin.", ["traffic"], registry=reg
        )
        for traffic in _TRAFFIC:
            gauges = (self.running, self.waiting, self.kv_usage, self.dropped, self.hook_errors)
            for metric in (*gauges, self.preemptions, *self.latency.values()):
                metric.labels(traffic)
            for reason in _FINISH_REASONS:
                self.requests.labels(traffic, reason)

    # From the telemetry, on server threads

    def traffic(self, engine_id: str, traffic: str) -> None:
        """Says that ``engine_id``'s requests are "serving" or "trial" ones."""
        self.kv_tokens.labels("predicted").set(math.nan)
        self.kv_tokens.labels("reported").set(math.nan)
        with self._lock:
            self._traffic = {**dict(list(self._traffic.items())[-8:]), engine_id: traffic}

    def heard(self, request: pb.PublishRequest, engine: EngineTelemetry) -> None:
        """Takes one batch of the telemetry, and what its engine has said so far."""
        traffic = self._traffic.get(request.engine_id)
        if traffic is None:
            return
        self.dropped.labels(traffic).set(sum(engine.dropped.values()))
        self.hook_errors.labels(traffic).set(sum(engine.hook_errors.values()))
        for event in request.events:
            self._event(traffic, event)

    def _event(self, traffic: str, event: pb.Event) -> None:
        if event.HasField("request_finished"):
            self._request(traffic, event.request_finished)
        elif event.HasField("step_stats"):
            stats = event.step_stats
            self.running.labels(traffic).set(stats.running_requests)
            self.waiting.labels(traffic).set(stats.waiting_requests)
            self.kv_usage.labels(traffic).set(stats.kv_cache_usage)
            self.preemptions.labels(traffic).inc(stats.preemptions)
        elif event.HasField("phase_reached") and event.phase_reached.HasField("kv_cache_tokens"):
            self.kv_tokens.labels("reported").set(event.phase_reached.kv_cache_tokens)
        elif event.HasField("repair_report") and event.repair_report.HasField("predicted_kv_cache_tokens"):
            self.kv_tokens.labels("predicted").set(event.repair_report.predicted_kv_cache_tokens)

    def _request(self, traffic: str, request: pb.RequestFinished) -> None:
        known = request.finish_reason in _FINISH_REASONS
        self.requests.labels(traffic, request.finish_reason if known else _OTHER_REASON).inc()
        if request.HasField("ttft_seconds"):
            self._observe("ttft", traffic, request.ttft_seconds)
        if request.HasField("inter_token_seconds"):
            self._observe("itl", traffic, request.inter_token_seconds)
        self._observe("e2e", traffic, request.e2e_seconds)

    def _observe(self, latency: str, traffic: str, seconds: float) -> None:
        # A sum that is not a number would stay so.
        if 0 <= seconds < math.inf:
            self.latency[latency].labels(traffic).observe(seconds)

    # From the loop

    def entered(self, state: State, *, ready: bool, cause: Cause | None = None) -> None:
        """Takes a change of state."""
        if cause is not None:
            self.reason.info({"state": str(state), "reason": str(cause)})
        self.state.state(str(state))
        self._ready = ready

    def serving(self, args: Mapping[str, object]) -> None:
        """Takes what is served from now on."""
        self.serving_info.info({name: str(value) for name, value in args.items()})

    def trial(self, trial: Trial, trials: list[Trial]) -> None:
        """Takes a trial that has ended; ``trials`` are all of its run."""
        status, result = trial.status, trial.result
        if status is Status.RUNNING:
            return
        self.trials.labels(str(status)).inc()
        for change in trial.plan.changes:
            self.repairs.labels(change.name).inc()
        ran = sum(t.status not in (Status.REFUSED, Status.ABORTED) for t in trials)
        self.budget_remaining.set(max(self._config.search.budget - ran, 0))
        if result is None:
            return
        if result.crash is not None:
            self.crashed(result.crash, "trial")
        parts = {"start": result.start_s, "warmup": result.warmup_s, "load": result.load_s, "stop": result.stop_s}
        for part, seconds in parts.items():
            self.trial_seconds.labels(part).inc(seconds or 0)
        self._compare(trial, trials)

    def _compare(self, trial: Trial, trials: list[Trial]) -> None:
        feasible = [t for t in trials if t.status is Status.FEASIBLE and t.result and t.result.value is not None]
        best = max(feasible, key=_value, default=None)
        for name, shown in (("last", trial), ("baseline", baseline(trials)), ("best", best)):
            for latency, seconds in _p99s(shown):
                self.p99.labels(latency, name).set(seconds)
            self.objective.labels(name).set(math.nan if shown is None else _value(shown))

    def crashed(self, crash: Crash, traffic: str) -> None:
        """Takes a crash of the "serving" engine or of a "trial" one."""
        self.crashes.labels(str(crash.category), crash.phase, traffic).inc()

    def decided(self, decision: Decision) -> None:
        """Takes the decision of a run."""
        self.decisions.labels(_word(decision.outcome)).inc()

    # HTTP

    def serve(self) -> WSGIServer:
        """Starts the HTTP server; its address is ``server_address``. Raises OSError."""
        where = self._config.metrics
        try:
            server = make_server(where.host, where.port, self._app(), _Server, _QuietHandler)
        except OSError as error:
            raise OSError(f"metrics: {where.host}:{where.port}: {error.strerror}{port_owner(where.port)}") from None
        threading.Thread(target=server.serve_forever, name="sloguard-metrics", daemon=True).start()
        return server

    def _app(self) -> WSGIApplication:
        def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
            path = environ.get("PATH_INFO")
            if path == "/metrics":
                start_response("200 OK", [("Content-Type", CONTENT_TYPE_LATEST)])
                return [generate_latest(self.registry)]
            status = "404 Not Found"
            if path == "/ready":
                status = "200 OK" if self._ready else "503 Service Unavailable"
            start_response(status, [("Content-Type", "text/plain")])
            return [status.encode() + b"\n"]

        return app


_LATENCIES = {
    "ttft": "Time to first token, as vLLM saw it.",
    "itl": "Mean time between a request's tokens, as vLLM saw it.",
    "e2e": "End-to-end latency, as vLLM saw it.",
}


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    timeout = _PATIENCE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a scrape is no event."""


def _p99s(trial: Trial | None) -> list[tuple[str, float]]:
    """Each latency's p99, seconds; NaN where there is none, so that an older trial's does not stay."""
    measured = trial.result.measurement if trial and trial.result else None
    if measured is None:
        return [(name, math.nan) for name in _P99S]
    values = (measured.ttft_p99_ms, measured.itl_p99_ms, measured.e2e_p99_ms)
    return [(name, math.nan if ms is None else ms / 1000) for name, ms in zip(_P99S, values, strict=True)]


def _value(trial: Trial) -> float:
    return trial.result.value if trial.result and trial.result.value is not None else float("nan")


def _word(outcome: Outcome) -> str:
    return outcome.name.lower()
