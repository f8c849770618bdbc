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
_MAX_PENDING = 4096
# The interpreter's lock is let go after this many steps, so that vLLM's own thread never waits for long.
_STEPS_AT_ONCE = 16

_loggers: "list[SloguardStatLogger]" = []


class SloguardStatLogger(StatLoggerBase):
    """Turns what vLLM hands to its stat loggers into events. Nothing that it does can fail a request."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._index = engine_index
        self._pending: deque[tuple[int, float, SchedulerStats | None, IterationStats | None]] = deque(
            maxlen=_MAX_PENDING
        )
        self._steps = StepLog()
        self._counted, self._preempted, self._tokens = 0, 0, 0  # since the last totals
        self._levels: SchedulerStats | None = None
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
            client.add_source(self.digest, self.totals)
            # The engine's processes exist by now, so this one forks no more.
            client.open()

    def digest(self) -> Iterator[pb.Event]:
        """The requests that have ended since the last call; counts the steps. On the sending thread."""
        if self is _loggers[0]:
            yield from _front_end_events()
        for count in range(1, len(self._pending) + 1):
            number, at, scheduler, iteration = self._pending.popleft()
            if scheduler is not None:
                self._levels = scheduler
                self._counted += 1
            if iteration is not None:
                self._preempted += iteration.num_preempted_reqs
                self._tokens += iteration.num_generation_tokens
                resumed = "sloguard_resumed" in iteration.__dict__
                self._steps.add(number, at, iteration.inter_token_latencies_iter, resumed=resumed)
                if iteration.finished_requests:
                    yield from self._finished(number, iteration)
            if count % _STEPS_AT_ONCE == 0:
                time.sleep(0)

    def _finished(self, number: int, iteration: IterationStats) -> Iterator[pb.Event]:
        for request in iteration.finished_requests:
            yield finished_event(request, self._steps, number)
        if not self._answered:
            # By now what is imported late, with the first request, is there too.
            self._answered = True
            plugin.harmless(plugin.record_imports)()

    def totals(self) -> Iterator[pb.Event]:
        """The steps since the last call; none without a step."""
        levels, self._levels = self._levels, None
        if levels is None:
            return
        gaps = self._steps.take_histogram().counts
        yield pb.Event(
            step_stats=pb.StepStats(
                engine_index=self._index,
                running_requests=levels.num_running_reqs,
                waiting_requests=levels.num_waiting_reqs,
                kv_cache_usage=levels.kv_cache_usage,
                preemptions=self._preempted,
                steps=self._counted,
                generated_tokens=self._tokens,
                gap_buckets=gaps.keys(),
                gap_counts=gaps.values(),
            )
        )
        self._counted, self._preempted, self._tokens = 0, 0, 0

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
