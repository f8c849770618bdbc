"""Metrics of the engines and their requests, from what the plugins report."""

import math
import threading

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sidecar.config.slo import LatencyKind, Slo
from sidecar.metrics.gap_collector import GapCollector
from sidecar.observe.telemetry import EngineTelemetry
from sidecar.observe.traffic import REJECTED, is_probe
from sidecar.observe.user_requests import UserRequest, latency_s, missed_slo, user_request
from vllm_sloguard.guard.rules import ALL
from vllm_sloguard.wire import telemetry_pb2 as pb

TRAFFIC = ("serving", "trial")
_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_RATIO_BUCKETS = (0.5, 0.8, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.25, 2.0)
_LATENCIES = {
    LatencyKind.TTFT: "Time to first token, measured in vLLM.",
    LatencyKind.TPOT: "Time per output token, measured in vLLM: the mean gap between a request's tokens.",
    LatencyKind.E2E: "End-to-end latency, measured in vLLM.",
}
_ITL = "Inter-token latency, measured in vLLM: every gap between two tokens."
_RESET = "Serving traffic is counted from 0 again when another configuration serves."
# Series that exist before their first event show it as an increase.
_FINISH_REASONS = ("stop", "length", "abort", "error", REJECTED)
_ABORTS = ("after_limit", "within_limits")
_RULES = frozenset(rule.name for rule in ALL)
_OTHER = "other"
_MAX_ENGINES = 8


class EngineMetrics:
    """Fed on the telemetry's threads, one batch at a time; engines that were not announced are not counted."""

    def __init__(self, registry: CollectorRegistry, slo: Slo) -> None:
        self._slo = slo
        self._per_request = {str(limit.kind): limit for limit in slo.per_request}
        self._traffic: dict[str, str] = {}
        self._lost: dict[str, tuple[int, int]] = {}  # dropped events and hook errors, by engine
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
            "sloguard_engine_preemptions",
            "Requests preempted because the KV cache was full.",
            ["traffic"],
            registry=reg,
        )
        for metric in (self._running, self._waiting, self._kv_usage, self._preemptions):
            for traffic in TRAFFIC:
                metric.labels(traffic)

    def _define_requests(self, reg: CollectorRegistry) -> None:
        self._requests = Counter(
            "sloguard_requests",
            "Requests that ended, by vLLM's finish reason; rejected ones never ran.",
            ["traffic", "finish_reason"],
            registry=reg,
        )
        self._aborts = Counter(
            "sloguard_aborted_requests",
            "Users' requests that the client aborted, after a limit had passed (an SLO miss) or within all limits.",
            ["abort"],
            registry=reg,
        )
        for abort in _ABORTS:
            self._aborts.labels(abort)
        self._latency: dict[str, Histogram] = {
            str(kind): Histogram(
                f"sloguard_request_{kind}_seconds",
                f"{about} {_RESET}",
                ["traffic"],
                buckets=self._buckets_s(kind),
                registry=reg,
            )
            for kind, about in _LATENCIES.items()
        }
        self._gaps = GapCollector(
            "sloguard_request_itl_seconds", f"{_ITL} {_RESET}", TRAFFIC, self._buckets_s(LatencyKind.ITL)
        )
        reg.register(self._gaps)
        for traffic in TRAFFIC:
            for reason in (*_FINISH_REASONS, _OTHER):
                self._requests.labels(traffic, reason)
            for histogram in self._latency.values():
                histogram.labels(traffic)

    def _buckets_s(self, kind: LatencyKind) -> list[float]:
        """With a boundary at each limit, so that the share within it is exact."""
        limits = (limit.limit_ms / 1000 for limit in self._slo.latency_limits if limit.kind is kind)
        return sorted({*_BUCKETS_S, *limits})

    def _define_slo(self, reg: CollectorRegistry) -> None:
        limits = Gauge(
            "sloguard_slo_limit_seconds", "Limit on a statistic of a latency.", ["latency", "statistic"], registry=reg
        )
        for limit in self._slo.latency_limits:
            limits.labels(str(limit.kind), str(limit.statistic)).set(limit.limit_ms / 1000)
        budget = Gauge(
            "sloguard_slo_error_budget_ratio",
            "Share of the requests that may miss an objective: 1 % for a limit on a p99.",
            ["objective"],
            registry=reg,
        )
        shares = {name: limit.allowed_share or 0.0 for name, limit in self._per_request.items()}
        shares |= {"errors": self._slo.error_rate, "any": self._slo.allowed_misses}
        self._judged = Counter(
            "sloguard_slo_requests",
            "Users' requests that an objective applies to, under the current configuration.",
            ["objective"],
            registry=reg,
        )
        self._missed = Counter(
            "sloguard_slo_misses",
            "Users' requests that missed an objective, under the current configuration.",
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
            "KV cache of the last engine: the guard's prediction and vLLM's report.",
            ["source"],
            registry=reg,
        )
        self._forget_tokens()
        self._kv_ratio = Histogram(
            "sloguard_guard_kv_cache_prediction_ratio",
            "The guard's prediction of an engine's KV cache relative to vLLM's report; 1 is exact.",
            buckets=_RATIO_BUCKETS,
            registry=reg,
        )
        self._repairs = Counter(
            "sloguard_repairs",
            "Repairs of engine arguments, before a trial or inside vLLM, by rule.",
            ["rule"],
            registry=reg,
        )
        for rule in (*sorted(_RULES), _OTHER):
            self._repairs.labels(rule)
        self._dropped = Counter(
            "sloguard_telemetry_dropped_events",
            "Events that the engine's plugin dropped because its queue was full.",
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
        """Announces an engine, whose requests are "serving" or "trial" traffic."""
        self._forget_tokens()
        with self._lock:
            self._traffic = {**dict(list(self._traffic.items())[1 - _MAX_ENGINES :]), engine_id: traffic}
            self._lost = {known: self._lost[known] for known in self._traffic if known in self._lost}

    def another_serves(self) -> None:
        """Counts SLO attainment and latencies of serving traffic from 0: another configuration serves."""
        for objective in self._objectives:
            self._judged.labels(objective).reset()
            self._missed.labels(objective).reset()
        for histogram in self._latency.values():
            histogram.remove("serving")
            histogram.labels("serving")
        self._gaps.reset("serving")

    def ended(self, traffic: str) -> None:
        """The engine for ``traffic`` has ended: its levels are 0."""
        for level in (self._running, self._waiting, self._kv_usage):
            level.labels(traffic).set(0)

    def repaired(self, rules: tuple[str, ...]) -> None:
        """Counts a repair by the broken ``rules``."""
        for rule in dict.fromkeys(name if name in _RULES else _OTHER for name in rules or (_OTHER,)):
            self._repairs.labels(rule).inc()

    def on_events(self, request: pb.PublishRequest, engine: EngineTelemetry) -> None:
        """Takes a batch of the telemetry; ``engine`` is what is known of its engine."""
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
                self._gaps.add(traffic, event.step_stats.gap_buckets, event.step_stats.gap_counts)
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
            self._observe("tpot", traffic, request.inter_token_seconds)
        self._observe("e2e", traffic, request.e2e_seconds)
        if traffic == "serving" and not is_probe(request):
            self._judge(user_request(0.0, request))

    def _observe(self, latency: str, traffic: str, seconds: float) -> None:
        # NaN would make the sum NaN for good.
        if 0 <= seconds < math.inf:
            self._latency[latency].labels(traffic).observe(seconds)

    def _judge(self, request: UserRequest) -> None:
        missed = missed_slo(request, self._slo)
        if request.aborted:
            self._aborts.labels("after_limit" if missed else "within_limits").inc()
            if not missed:
                return
        met: dict[str, bool] = {"errors": not request.failed, "any": not missed}
        for name, limit in self._per_request.items():
            if (seconds := latency_s(request, limit)) is not None:
                met[name] = seconds * 1000 <= limit.limit_ms
        for objective, kept in met.items():
            self._judged.labels(objective).inc()
            self._missed.labels(objective).inc(not kept)

    def _forget_tokens(self) -> None:
        for source in ("predicted", "reported"):
            self._kv_tokens.labels(source).set(math.nan)
