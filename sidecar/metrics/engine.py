"""Metrics of the engines and their requests, from what the plugins tell of them."""

import math
import threading

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sidecar.config.slo import Slo
from sidecar.observe.telemetry import EngineTelemetry
from sidecar.observe.traffic import is_probe
from sidecar.observe.user_requests import UserRequest, missed_slo, user_request
from vllm_sloguard.guard.rules import ALL
from vllm_sloguard.wire import telemetry_pb2 as pb

TRAFFIC = ("serving", "trial")
_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_RATIO_BUCKETS = (0.5, 0.8, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.25, 2.0)
_LATENCIES = {
    "ttft": "Time to first token, as vLLM saw it.",
    "itl": "Mean time between a request's tokens, as vLLM saw it.",
    "e2e": "End-to-end latency, as vLLM saw it.",
}
# A series that exists before its first event shows that event as a rise.
_FINISH_REASONS = ("stop", "length", "abort", "error")
_RULES = frozenset(rule.name for rule in ALL)
_OTHER = "other"
# What a limit on a 99th percentile allows.
_P99_ALLOWS = 0.01
_MOST_ENGINES = 8


class EngineMetrics:
    """Fed on the telemetry's threads, one batch at a time; an engine that was not announced is not counted."""

    def __init__(self, registry: CollectorRegistry, slo: Slo) -> None:
        self._slo = slo
        self._limits_ms = {
            name: limit_ms
            for name, limit_ms in (("ttft", slo.ttft_p99_ms), ("itl", slo.itl_p99_ms), ("e2e", slo.e2e_p99_ms))
            if limit_ms is not None
        }
        self._traffic: dict[str, str] = {}
        self._lost: dict[str, tuple[int, int]] = {}  # dropped events and hook errors so far, by engine
        self._lock = threading.Lock()
        self._define_levels(registry)
        self._define_requests(registry)
        self._define_slo(registry)
        self._define_plugin(registry)

    def _define_levels(self, reg: CollectorRegistry) -> None:
        self._running = Gauge(
            "sloguard_engine_running_requests", "Requests running in the engine.", ["traffic"], registry=reg
        )
        self._waiting = Gauge(
            "sloguard_engine_waiting_requests", "Requests waiting in the engine.", ["traffic"], registry=reg
        )
        self._kv_usage = Gauge(
            "sloguard_engine_kv_cache_usage_ratio", "KV cache in use, 0 to 1.", ["traffic"], registry=reg
        )
        self._preemptions = Counter(
            "sloguard_engine_preemptions", "Requests that lost their KV cache for others.", ["traffic"], registry=reg
        )
        for metric in (self._running, self._waiting, self._kv_usage, self._preemptions):
            for traffic in TRAFFIC:
                metric.labels(traffic)

    def _define_requests(self, reg: CollectorRegistry) -> None:
        self._requests = Counter(
            "sloguard_requests", "Requests that ended, by vLLM's reason.", ["traffic", "finish_reason"], registry=reg
        )
        self._latency: dict[str, Histogram] = {}
        for name, about in _LATENCIES.items():
            # A limit that is a bucket boundary makes its attainment exact.
            own = {self._limits_ms[name] / 1000} if name in self._limits_ms else set[float]()
            buckets: list[float] = sorted({*_BUCKETS_S, *own})
            self._latency[name] = Histogram(
                f"sloguard_request_{name}_seconds",
                f"{about} Serving traffic is counted from 0 again when another configuration serves.",
                ["traffic"],
                buckets=buckets,
                registry=reg,
            )
        for traffic in TRAFFIC:
            for reason in (*_FINISH_REASONS, _OTHER):
                self._requests.labels(traffic, reason)
            for histogram in self._latency.values():
                histogram.labels(traffic)

    def _define_slo(self, reg: CollectorRegistry) -> None:
        limit = Gauge("sloguard_slo_limit_seconds", "Limit on the 99th percentile.", ["latency"], registry=reg)
        for name, limit_ms in self._limits_ms.items():
            limit.labels(name).set(limit_ms / 1000)
        budget = Gauge(
            "sloguard_slo_error_budget_ratio",
            "Share of the requests that may miss an objective: 1 % of a limit on a 99th percentile.",
            ["objective"],
            registry=reg,
        )
        shares = {**dict.fromkeys(self._limits_ms, _P99_ALLOWS), "errors": self._slo.error_rate}
        shares["any"] = max(shares.values())
        self._judged = Counter(
            "sloguard_slo_requests",
            "Users' requests that an objective applies to, since what serves now was first served.",
            ["objective"],
            registry=reg,
        )
        self._missed = Counter(
            "sloguard_slo_misses",
            "Users' requests that missed an objective, since what serves now was first served.",
            ["objective"],
            registry=reg,
        )
        for objective, share in shares.items():
            budget.labels(objective).set(share)
            self._judged.labels(objective)
            self._missed.labels(objective)
        self._objectives = tuple(shares)

    def _define_plugin(self, reg: CollectorRegistry) -> None:
        self._kv_tokens = Gauge(
            "sloguard_kv_cache_tokens",
            "KV cache of the last engine: the guard's estimate, and what vLLM reported.",
            ["source"],
            registry=reg,
        )
        self._forget_tokens()
        self._kv_ratio = Histogram(
            "sloguard_guard_kv_cache_prediction_ratio",
            "The guard's estimate of an engine's KV cache over what vLLM reported; 1 is exact.",
            buckets=_RATIO_BUCKETS,
            registry=reg,
        )
        self._repairs = Counter(
            "sloguard_repairs",
            "Repairs of engine arguments, before a trial or inside vLLM, by the rule that was broken.",
            ["rule"],
            registry=reg,
        )
        for rule in (*sorted(_RULES), _OTHER):
            self._repairs.labels(rule)
        self._dropped = Counter(
            "sloguard_telemetry_dropped_events",
            "Events that the engine's plugin has dropped, its queue being full.",
            ["traffic"],
            registry=reg,
        )
        self._hook_errors = Counter(
            "sloguard_plugin_hook_errors", "Exceptions caught in the engine's plugin.", ["traffic"], registry=reg
        )
        for traffic in TRAFFIC:
            self._dropped.labels(traffic)
            self._hook_errors.labels(traffic)

    def expect(self, engine_id: str, traffic: str) -> None:
        """Says that ``engine_id``'s requests are "serving" or "trial" ones."""
        self._forget_tokens()
        with self._lock:
            self._traffic = {**dict(list(self._traffic.items())[1 - _MOST_ENGINES :]), engine_id: traffic}
            self._lost = {known: self._lost[known] for known in self._traffic if known in self._lost}

    def another_serves(self) -> None:
        """Another configuration serves from now on: how it keeps the SLO is counted from 0."""
        for objective in self._objectives:
            self._judged.labels(objective).reset()
            self._missed.labels(objective).reset()
        for histogram in self._latency.values():
            histogram.remove("serving")
            histogram.labels("serving")

    def ended(self, traffic: str) -> None:
        """There is no engine for ``traffic`` any more: its last levels must not stay."""
        for level in (self._running, self._waiting, self._kv_usage):
            level.labels(traffic).set(0)

    def repaired(self, rules: tuple[str, ...]) -> None:
        """Takes one repair, which mended what broke ``rules``."""
        for rule in dict.fromkeys(name if name in _RULES else _OTHER for name in rules or (_OTHER,)):
            self._repairs.labels(rule).inc()

    def heard(self, request: pb.PublishRequest, engine: EngineTelemetry) -> None:
        """Takes one batch of the telemetry, and what its engine has said so far."""
        traffic = self._traffic.get(request.engine_id)
        if traffic is None:
            return
        self._losses(request.engine_id, traffic, engine)
        for event in request.events:
            self._event(traffic, event, engine)

    def _losses(self, engine_id: str, traffic: str, engine: EngineTelemetry) -> None:
        now = sum(engine.dropped.values()), sum(engine.hook_errors.values())
        with self._lock:
            before = self._lost.get(engine_id, (0, 0))
            self._lost[engine_id] = now
        self._dropped.labels(traffic).inc(max(now[0] - before[0], 0))
        self._hook_errors.labels(traffic).inc(max(now[1] - before[1], 0))

    def _event(self, traffic: str, event: pb.Event, engine: EngineTelemetry) -> None:
        match event.WhichOneof("kind"):
            case "request_finished":
                self._request(traffic, event.request_finished)
            case "step_stats":
                levels = engine.levels
                self._running.labels(traffic).set(levels.running_requests)
                self._waiting.labels(traffic).set(levels.waiting_requests)
                self._kv_usage.labels(traffic).set(levels.kv_cache_usage)
                self._preemptions.labels(traffic).inc(event.step_stats.preemptions)
            case "phase_reached" if event.phase_reached.HasField("kv_cache_tokens"):
                self._kv_tokens.labels("reported").set(event.phase_reached.kv_cache_tokens)
                self._compare_tokens(engine)
            case "repair_report":
                for change in event.repair_report.changes:
                    self.repaired((*change.rules,))
                if event.repair_report.HasField("predicted_kv_cache_tokens"):
                    self._kv_tokens.labels("predicted").set(event.repair_report.predicted_kv_cache_tokens)
                    self._compare_tokens(engine)
            case _:
                return

    def _compare_tokens(self, engine: EngineTelemetry) -> None:
        report, reported = engine.repair, engine.kv_cache_tokens
        if report is not None and report.HasField("predicted_kv_cache_tokens") and reported:
            self._kv_ratio.observe(report.predicted_kv_cache_tokens / reported)

    def _request(self, traffic: str, request: pb.RequestFinished) -> None:
        known = request.finish_reason in _FINISH_REASONS
        self._requests.labels(traffic, request.finish_reason if known else _OTHER).inc()
        if request.HasField("ttft_seconds"):
            self._observe("ttft", traffic, request.ttft_seconds)
        if request.HasField("inter_token_seconds"):
            self._observe("itl", traffic, request.inter_token_seconds)
        self._observe("e2e", traffic, request.e2e_seconds)
        if traffic == "serving" and not is_probe(request):
            self._judge(user_request(0.0, request))

    def _observe(self, latency: str, traffic: str, seconds: float) -> None:
        # A sum that is not a number would stay so.
        if 0 <= seconds < math.inf:
            self._latency[latency].labels(traffic).observe(seconds)

    def _judge(self, request: UserRequest) -> None:
        if request.aborted and not missed_slo(request, self._slo):
            return
        itl_ms = request.itl.p99_ms if request.itl is not None else request.tpot_ms
        took_ms = {"ttft": request.ttft_ms, "itl": itl_ms, "e2e": request.e2e_ms}
        met: dict[str, bool] = {"errors": not request.failed, "any": not missed_slo(request, self._slo)}
        met |= {
            name: ms <= self._limits_ms[name]
            for name, ms in took_ms.items()
            if ms is not None and name in self._limits_ms
        }
        for objective, kept in met.items():
            self._judged.labels(objective).inc()
            self._missed.labels(objective).inc(not kept)

    def _forget_tokens(self) -> None:
        for source in ("predicted", "reported"):
            self._kv_tokens.labels(source).set(math.nan)
