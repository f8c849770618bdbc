"""Collects the plugins' telemetry: a gRPC service on the private socket that groups events by engine.

Memory is bounded: a sample of the requests (sidecar.observe.traffic) of the last few engines only.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from sidecar.observe.traffic import Traffic, TrafficRecorder
from vllm_sloguard.wire import telemetry_pb2 as pb
from vllm_sloguard.wire.telemetry_pb2_grpc import TelemetryServiceServicer

_MAX_ENGINES = 8
_MAX_SAMPLES = 3  # only the serving engine's requests are read, and what is started beside it is soon ended
_MAX_RANKS = 1024
_MAX_REPORTS = 32
_MAX_PROCESSES = 4096


@dataclass(frozen=True)
class EngineLevels:
    """Scheduler levels over all data-parallel ranks: total requests, and the fullest rank's KV cache (0 to 1)."""

    running_requests: int
    waiting_requests: int
    kv_cache_usage: float


@dataclass
class EngineTelemetry:
    """What one engine has reported. ``phases`` are seconds since the epoch at which each was first reached.

    ``ranks`` has the last report of each data-parallel rank.
    """

    recorder: TrafficRecorder = field(default_factory=lambda: TrafficRecorder(time.monotonic()))
    ranks: dict[int, pb.StepStats] = field(default_factory=dict[int, pb.StepStats])
    total_steps: int = 0
    preemptions: int = 0
    phases: dict[int, float] = field(default_factory=dict[int, float])
    kv_cache_tokens: int | None = None
    memory: pb.MemoryProfiled | None = None
    crashes: list[pb.CrashReport] = field(default_factory=list[pb.CrashReport])
    repair: pb.RepairReport | None = None
    sequences: dict[int, int] = field(default_factory=dict[int, int])
    dropped: dict[int, int] = field(default_factory=dict[int, int])
    hook_errors: dict[int, int] = field(default_factory=dict[int, int])

    @property
    def requests(self) -> list[pb.RequestFinished]:
        """Finished requests, probes included; a sample if there were many."""
        return self.recorder.requests

    @property
    def open_requests(self) -> int:
        """Admitted requests not reported as finished."""
        return max(self.recorder.admitted - self.recorder.ended, 0)

    @property
    def levels(self) -> EngineLevels:
        """The scheduler's latest levels."""
        ranks = self.ranks.values()
        return EngineLevels(
            sum(r.running_requests for r in ranks),
            sum(r.waiting_requests for r in ranks),
            max((r.kv_cache_usage for r in ranks), default=0.0),
        )

    def add(self, event: pb.Event) -> None:
        """Processes one event."""
        match event.WhichOneof("kind"):
            case "request_finished":
                self.recorder.request(event.request_finished, time.monotonic())
            case "step_stats":
                self._step(event.step_stats)
            case "admission_counts":
                self.recorder.admitted += event.admission_counts.admitted
            case "phase_reached":
                phase, at = event.phase_reached.phase, event.time_unix_seconds
                self.phases[phase] = min(at, self.phases.get(phase, at))
                if event.phase_reached.HasField("kv_cache_tokens"):
                    self.kv_cache_tokens = event.phase_reached.kv_cache_tokens
            case "crash_report":
                self.crashes = [*self.crashes, event.crash_report][-_MAX_REPORTS:]
            case "memory_profiled":
                self.memory = event.memory_profiled
            case "repair_report":
                self.repair = event.repair_report
            case _:
                return

    def _step(self, stats: pb.StepStats) -> None:
        if stats.engine_index in self.ranks or len(self.ranks) < _MAX_RANKS:
            self.ranks[stats.engine_index] = stats
        self.total_steps += stats.steps
        self.preemptions += stats.preemptions
        self.recorder.step_gaps(stats, time.monotonic())


# Called with each batch and its engine's accumulated telemetry, on a server thread; must be quick and must not raise.
Listener = Callable[[pb.PublishRequest, EngineTelemetry], None]


class TelemetryHub(TelemetryServiceServicer):
    """Receives the plugins' batches; rejects engines not announced by ``expect``."""

    def __init__(self, listener: Listener | None = None) -> None:
        self._listener = listener
        self._engines: OrderedDict[str, EngineTelemetry] = OrderedDict()
        self._lock = threading.Lock()

    def expect(self, engine_id: str) -> None:
        """Accepts telemetry from ``engine_id``; the oldest engine is forgotten when there are too many."""
        with self._lock:
            self._engines[engine_id] = EngineTelemetry()
            while len(self._engines) > _MAX_ENGINES:
                self._engines.popitem(last=False)
            for engine in list(self._engines.values())[:-_MAX_SAMPLES]:
                engine.recorder.forget_requests()

    def of(self, engine_id: str) -> EngineTelemetry:
        """The accumulated telemetry of ``engine_id``; empty for an unknown engine."""
        with self._lock:
            return self._engines.get(engine_id, EngineTelemetry())

    def traffic(self, engine_id: str) -> Traffic | None:
        """The traffic that ``engine_id`` has reported; None before its first report."""
        with self._lock:
            engine = self._engines.get(engine_id)
            return engine.recorder.snapshot() if engine is not None and engine.sequences else None

    def Publish(self, request: pb.PublishRequest, context: grpc.ServicerContext) -> pb.PublishResponse:  # noqa: N802
        """Takes one batch; duplicates are ignored."""
        with self._lock:
            engine = self._engines.get(request.engine_id)
            if engine is None:
                context.abort(grpc.StatusCode.NOT_FOUND, f"engine_id: {request.engine_id[:80]!r} is not running here")
            assert engine is not None
            pid = request.process.pid
            if pid not in engine.sequences and len(engine.sequences) >= _MAX_PROCESSES:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"process.pid: more than {_MAX_PROCESSES} processes")
            if request.sequence <= engine.sequences.get(pid, 0):
                return pb.PublishResponse()
            engine.sequences[pid] = request.sequence
            engine.dropped[pid] = request.dropped_events
            engine.hook_errors[pid] = request.hook_errors
            for event in request.events:
                engine.add(event)
            if self._listener is not None:
                self._listener(request, engine)
        return pb.PublishResponse()
