"""vLLM's statistics as telemetry. vLLM alone imports this module.

``record`` runs on vLLM's step: it keeps references to what vLLM hands over, and the sending thread does the rest.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from vllm_sloguard.hooks import plugin, request_hooks
from vllm_sloguard.hooks.request_events import aborted_event, finished_event, rejected_event
from vllm_sloguard.hooks.request_hooks import front_end, settle_stalls, step_number
from vllm_sloguard.hooks.step_log import StepLog
from vllm_sloguard.wire import telemetry_pb2 as pb

# Bounds what waits while the sidecar hangs: some seconds of steps.
_MOST_PENDING = 4096
# The interpreter's lock is let go after this many steps, so that vLLM's own thread never waits for long.
_STEPS_AT_ONCE = 16

_loggers: "list[SloguardStatLogger]" = []


class SloguardStatLogger(StatLoggerBase):
    """Turns what vLLM hands to its stat loggers into events. Nothing that it does can fail a request."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._index = engine_index
        self._pending: deque[tuple[int, float, SchedulerStats | None, IterationStats | None]] = deque(
            maxlen=_MOST_PENDING
        )
        self._steps = StepLog()
        self._answered = False
        client = plugin.link()
        self._active = client is not None and bool(client.settings.socket)
        if self._active:
            request_hooks.install()
        _loggers.append(self)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM after each step."""
        if self._active:
            if iteration_stats is not None and "sloguard_resumed" in iteration_stats.__dict__:
                plugin.harmless(settle_stalls)(iteration_stats)
            step_number.done = number = step_number.done + 1
            self._pending.append((number, time.monotonic(), scheduler_stats, iteration_stats))

    def log_engine_initialized(self) -> None:
        """Called by vLLM once the engine is up."""
        plugin.harmless(self._opened)()

    def _opened(self) -> None:
        client = plugin.link()
        if client is not None:
            client.emit(pb.Event(phase_reached=pb.PhaseReached(phase=pb.PHASE_ENGINE_READY)))
            client.add_source(self.collect)
            # The engine's processes exist by now, so this one forks no more.
            client.open()

    def collect(self) -> Iterator[pb.Event]:
        """The events of the steps since the last call, on the sending thread."""
        if self is _loggers[0]:
            yield from _front_end_events()
        levels: SchedulerStats | None = None
        totals = pb.StepStats(engine_index=self._index)
        for count in range(1, len(self._pending) + 1):
            number, at, scheduler, iteration = self._pending.popleft()
            if scheduler is not None:
                levels = scheduler
                totals.steps += 1
            if iteration is not None:
                totals.preemptions += iteration.num_preempted_reqs
                totals.generated_tokens += iteration.num_generation_tokens
                yield from self._iteration_events(number, at, iteration)
            if count % _STEPS_AT_ONCE == 0:
                time.sleep(0)
        if levels is not None:
            yield pb.Event(step_stats=self._step_stats(totals, levels))

    def _iteration_events(self, number: int, at: float, iteration: IterationStats) -> Iterator[pb.Event]:
        self._steps.add(number, at, iteration.inter_token_latencies_iter)
        for request in iteration.finished_requests:
            yield finished_event(request, self._steps, number)
        if iteration.finished_requests and not self._answered:
            # By now what is imported late, with the first request, is there too.
            self._answered = True
            plugin.harmless(plugin.record_imports)()

    def _step_stats(self, totals: pb.StepStats, levels: SchedulerStats) -> pb.StepStats:
        totals.running_requests = levels.num_running_reqs
        totals.waiting_requests = levels.num_waiting_reqs
        totals.kv_cache_usage = levels.kv_cache_usage
        gaps = self._steps.take_histogram().counts
        totals.gap_buckets.extend(gaps.keys())
        totals.gap_counts.extend(gaps.values())
        return totals

    def steps(self) -> StepLog:
        """The steps of this engine; for the sending thread."""
        return self._steps


def _front_end_events() -> Iterator[pb.Event]:
    if admitted := front_end.take_admitted():
        yield pb.Event(admission_counts=pb.AdmissionCounts(admitted=admitted))
    # With several engines, which of them a request was on is not known here.
    steps = _loggers[0].steps() if len(_loggers) == 1 else None
    while front_end.aborts:
        yield aborted_event(front_end.aborts.popleft(), steps)
    while front_end.rejections:
        yield rejected_event(front_end.rejections.popleft())
