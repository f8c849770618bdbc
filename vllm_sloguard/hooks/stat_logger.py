"""vLLM's statistics, request by request and step by step, as telemetry. vLLM alone imports this module."""

import functools
import time
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, SchedulerStats

from vllm_sloguard.hooks import plugin
from vllm_sloguard.wire import telemetry_pb2 as pb

_STEP_PERIOD_S = 0.25


class SloguardStatLogger(StatLoggerBase):
    """Turns what vLLM hands to its stat loggers into events. Nothing that it does can fail a request."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._index = engine_index
        self._steps = pb.StepStats(engine_index=engine_index)
        self._sent_at = 0.0
        self._answered = False
        plugin.harmless(_keep_first_token_latency)()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM after each step."""
        plugin.harmless(self._record)(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        """Called by vLLM once the engine is up."""
        plugin.harmless(self._opened)()

    def _opened(self) -> None:
        link = plugin.link()
        if link is not None:
            link.emit(pb.Event(phase_reached=pb.PhaseReached(phase=pb.PHASE_ENGINE_READY)))
            # The engine's processes exist by now, so this one forks no more.
            link.open()

    def _record(self, scheduler: SchedulerStats | None, iteration: IterationStats | None) -> None:
        link = plugin.link()
        if link is None:
            return
        if scheduler is not None:
            self._steps.running_requests = scheduler.num_running_reqs
            self._steps.waiting_requests = scheduler.num_waiting_reqs
            self._steps.kv_cache_usage = scheduler.kv_cache_usage
            self._steps.steps += 1
        if iteration is not None:
            self._steps.preemptions += iteration.num_preempted_reqs
            self._steps.generated_tokens += iteration.num_generation_tokens
            for request in iteration.finished_requests:
                link.emit(pb.Event(request_finished=_finished(request)))
            if iteration.finished_requests and not self._answered:
                # By now what is imported late, with the first request, is there too.
                self._answered = True
                plugin.record_imports()
        self._send_steps(link)

    def _send_steps(self, link: Any) -> None:
        now = time.monotonic()
        idle = not self._steps.running_requests and not self._steps.waiting_requests
        if now - self._sent_at < _STEP_PERIOD_S and not idle:
            return
        link.emit(pb.Event(step_stats=self._steps))
        self._steps = pb.StepStats(engine_index=self._index)
        self._sent_at = now


def _finished(request: FinishedRequestStats) -> pb.RequestFinished:
    tokens = request.num_generation_tokens
    ttft = getattr(request, "sloguard_ttft", None) or request.e2e_latency - request.decode_time
    return pb.RequestFinished(
        ttft_seconds=ttft if tokens else None,
        inter_token_seconds=request.decode_time / (tokens - 1) if tokens > 1 else None,
        e2e_seconds=request.e2e_latency,
        queue_seconds=max(request.queued_time, 0.0),
        prefill_seconds=max(request.prefill_time, 0.0),
        decode_seconds=max(request.decode_time, 0.0),
        prompt_tokens=request.num_prompt_tokens,
        output_tokens=tokens,
        finish_reason=str(request.finish_reason),
    )


def _keep_first_token_latency() -> None:
    """Carries each request's own time to first token, which vLLM measures and then leaves out, to its record."""
    original = IterationStats.update_from_finished_request
    if getattr(original, "sloguard", False):
        return

    @functools.wraps(original)
    def update(self: IterationStats, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin.harmless(_attach)(self, args, kwargs)

    setattr(update, "sloguard", True)  # noqa: B010 - a type checker knows no attributes of functions
    IterationStats.update_from_finished_request = update


def _attach(stats: IterationStats, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    state = kwargs.get("req_stats") or next(a for a in args if hasattr(a, "first_token_latency"))
    stats.finished_requests[-1].sloguard_ttft = state.first_token_latency  # pyright: ignore[reportAttributeAccessIssue]
