"""What the fake engine tells: the plugin's telemetry over the plugin's own link, and vLLM's own metrics.

The latter are some of vLLM 0.32's, by its names, types and labels.
"""

import os
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest

from vllm_sloguard.hooks.settings import Settings
from vllm_sloguard.hooks.telemetry_client import TelemetryClient
from vllm_sloguard.latency import GapHistogram
from vllm_sloguard.wire import telemetry_pb2 as pb

_LABELS = ("model_name", "engine")
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)


_KV_TOKENS, _PREDICTED_KV_TOKENS = 261_120, 262_144
_BLOCKS = 0.1  # of the KV cache, a request


class Telemetry:
    """The plugin of one engine; ``whole``: it reports requests and the KV cache, too."""

    def __init__(self, model: str, *, whole: bool) -> None:
        self.metrics = VllmMetrics(model)
        self._whole = whole
        self._link = TelemetryClient(Settings.from_environ(os.environ))
        self._link.open()
        self._emit(memory_profiled=pb.MemoryProfiled(kv_cache_bytes=2**26, vllm_version="0.32.0"))
        if whole:
            self._emit(repair_report=pb.RepairReport(predicted_kv_cache_tokens=_PREDICTED_KV_TOKENS))
            self._emit(phase_reached=pb.PhaseReached(phase=pb.PHASE_KV_CACHE_READY, kv_cache_tokens=_KV_TOKENS))
        self._emit(phase_reached=pb.PhaseReached(phase=pb.PHASE_ENGINE_READY))

    def _emit(self, **kind: Any) -> None:
        self._link.emit(pb.Event(**kind))

    def stepped(self, running: int, waiting: int) -> None:
        """Reports one step and the requests in the engine."""
        usage = min(_BLOCKS * running, 1.0)
        self.metrics.level(running, waiting, usage)
        stats = pb.StepStats(steps=1, generated_tokens=1)
        if self._whole:
            stats.running_requests, stats.waiting_requests, stats.kv_cache_usage = running, waiting, usage
        self._emit(step_stats=stats)

    def finished(self, e2e_s: float, prompt_tokens: int, output_tokens: int) -> None:
        """Reports a finished request; its TTFT is a third of its E2E latency."""
        ttft_s = e2e_s / 3
        itl_s = (e2e_s - ttft_s) / max(output_tokens - 1, 1)
        self.metrics.finished(ttft_s, itl_s, e2e_s, prompt_tokens, output_tokens)
        if self._whole:
            if output_tokens > 1:
                gaps = GapHistogram()
                gaps.add(itl_s, output_tokens - 1)
                self._emit(step_stats=pb.StepStats(gap_buckets=gaps.counts.keys(), gap_counts=gaps.counts.values()))
            self._emit(
                request_finished=pb.RequestFinished(
                    ttft_seconds=ttft_s,
                    inter_token_seconds=itl_s if output_tokens > 1 else None,
                    largest_gap_seconds=itl_s if output_tokens > 1 else None,
                    gap_p99_seconds=itl_s if output_tokens > 1 else None,
                    e2e_seconds=e2e_s,
                    prompt_tokens=prompt_tokens,
                    output_tokens=output_tokens,
                    finish_reason="length",
                )
            )


class VllmMetrics:
    """Counts requests as vLLM's API server does."""

    def __init__(self, model: str) -> None:
        disable_created_metrics()
        self._registry = CollectorRegistry()
        self._of = (model, "0")
        self._running = self._gauge("vllm:num_requests_running")
        self._waiting = self._gauge("vllm:num_requests_waiting")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc")
        self._preemptions = self._counter("vllm:num_preemptions")
        self._prompt_tokens = self._counter("vllm:prompt_tokens")
        self._generation_tokens = self._counter("vllm:generation_tokens")
        self._queries = self._counter("vllm:prefix_cache_queries")
        self._hits = self._counter("vllm:prefix_cache_hits")
        self._success = Counter("vllm:request_success", "…", [*_LABELS, "finished_reason"], registry=self._registry)
        self._ttft = self._histogram("vllm:time_to_first_token_seconds")
        self._itl = self._histogram("vllm:inter_token_latency_seconds")
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds")
        self._queue = self._histogram("vllm:request_queue_time_seconds")
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(*self._of, reason)

    def _gauge(self, name: str) -> Gauge:
        return Gauge(name, "…", _LABELS, registry=self._registry).labels(*self._of)

    def _counter(self, name: str) -> Counter:
        return Counter(name, "…", _LABELS, registry=self._registry).labels(*self._of)

    def _histogram(self, name: str) -> Histogram:
        return Histogram(name, "…", _LABELS, buckets=_SECONDS, registry=self._registry).labels(*self._of)

    def level(self, running: int, waiting: int, kv_usage: float) -> None:
        """The scheduler's gauges."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_usage.set(kv_usage)

    def finished(self, ttft_s: float, itl_s: float, e2e_s: float, prompt_tokens: int, output_tokens: int) -> None:
        """Counts a finished request."""
        self._success.labels(*self._of, "length").inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._generation_tokens.inc(output_tokens)
        self._queries.inc(prompt_tokens)
        self._hits.inc(prompt_tokens // 4)
        self._ttft.observe(ttft_s)
        self._itl.observe(itl_s)
        self._e2e.observe(e2e_s)
        self._queue.observe(ttft_s / 2)

    def page(self) -> bytes:
        """The Prometheus exposition."""
        return generate_latest(self._registry)
