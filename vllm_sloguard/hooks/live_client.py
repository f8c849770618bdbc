"""The engine core's thread that polls the sidecar for live changes and reports their progress.

It long-polls on the sidecar's socket, so nothing can connect to the engine. It must not start before the last fork of
the process. It waits with asyncio: gRPC's other calls wake up five times a second while they wait.
"""

import asyncio
import threading
import time
from typing import Any

from vllm_sloguard.hooks.live_scheduler import LiveScheduler
from vllm_sloguard.hooks.settings import Settings
from vllm_sloguard.hooks.telemetry_client import unix_target
from vllm_sloguard.live_knobs import Effect, LiveProgress, LiveTargets
from vllm_sloguard.wire import live_pb2 as pb

# While a change is in force, its counters in the sidecar are at most this old.
_POLL_S = 1.0
# Before the first change there is nothing to report.
_IDLE_POLL_S = 5.0
_PATIENCE_S = 2.0
_PROGRESS_S = 0.2
_SHORTEST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0


class LiveLink:
    """Connects ``live`` with the sidecar at ``settings.socket``."""

    def __init__(self, settings: Settings, live: LiveScheduler, engine_index: int, vllm_version: str) -> None:
        self._settings = settings
        self._live = live
        self._engine_index = engine_index
        self._vllm_version = vllm_version
        self._reported = -1

    def open(self) -> None:
        """Starts the thread."""
        threading.Thread(target=self._run, name="sloguard-live", daemon=True).start()

    def _run(self) -> None:
        asyncio.run(self._poll())

    async def _poll(self) -> None:
        import grpc.aio

        from vllm_sloguard.wire.live_pb2_grpc import LiveServiceStub

        backoff = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 2000)]
        stub = LiveServiceStub(grpc.aio.insecure_channel(unix_target(self._settings.socket), backoff))
        pause_s = _SHORTEST_PAUSE_S
        while True:
            try:
                await self._exchange(stub)
                pause_s = _SHORTEST_PAUSE_S
            except Exception:  # noqa: BLE001 - the boundary to vLLM: this thread outlives whatever happens to it
                self._reported = -1
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            self._live.lapsed(time.monotonic())

    async def _exchange(self, stub: Any) -> None:
        record = self._live.record
        if record.pending():
            record.wait(self._reported, _PROGRESS_S)
        revision = record.revision
        poll_s = _POLL_S if record.in_force() is not None else _IDLE_POLL_S
        wait_s = poll_s if revision == self._reported and not record.pending() else 0.0
        answer = await stub.Await(self._request(wait_s), timeout=wait_s + _PATIENCE_S)
        self._reported = revision
        now = time.monotonic()
        record.answered(answer.epoch, now)
        if answer.HasField("change"):
            self._live.receive(_change(answer.change), now)

    def _request(self, wait_s: float) -> pb.AwaitRequest:
        record = self._live.record
        current = self._live.current()
        last = record.last()
        return pb.AwaitRequest(
            engine_id=self._settings.engine_id,
            engine_index=self._engine_index,
            vllm_version=self._vllm_version,
            knobs=[
                pb.LiveKnob(
                    name=name,
                    started=r.started,
                    current=current.get(name, r.started),
                    lowest=r.lowest,
                    highest=r.highest,
                )
                for name, r in record.ranges.items()
            ],
            cold=[pb.ColdKnob(name=name, reason=reason) for name, reason in record.cold.items()],
            report=None if last is None else _report(last),
            wait_seconds=wait_s,
        )


def _change(change: pb.LiveChange) -> LiveTargets:
    targets = {target.name: target.value for target in change.targets}
    return LiveTargets(change.epoch, change.change_id, targets, change.settle, change.lease_seconds)


def _report(progress: LiveProgress) -> pb.LiveReport:
    counters = progress.counters
    counted = counters.counts_lookups
    return pb.LiveReport(
        epoch=progress.change.epoch,
        change_id=progress.change.number,
        state=pb.LiveState.Name(progress.state),
        refusal=progress.refusal,
        applied_seconds=progress.applied_s,
        settled_seconds=progress.settled_s,
        effects=[_effect(name, effect) for name, effect in progress.effects.items()],
        counters=pb.LiveCounters(
            steps=counters.steps,
            most_running_requests=counters.most_running,
            most_scheduled_tokens=counters.most_tokens,
            prefix_cache_queries=counters.queries if counted else None,
            prefix_cache_hits=counters.hits if counted else None,
        ),
    )


def _effect(name: str, effect: Effect) -> pb.LiveEffect:
    return pb.LiveEffect(
        name=name,
        before=effect.before,
        target=effect.target,
        verdict=pb.LiveVerdict.Name(effect.verdict),
        seconds=effect.seconds,
        seen=effect.seen,
    )
