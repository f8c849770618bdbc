"""Timers around vLLM's methods and the plugin's hooks on them, for ``plugin_cost.py``. vLLM is imported where used."""

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Timer:
    """Time spent in one method, in seconds of ``clock``."""

    clock: Callable[[], float] = time.perf_counter
    seconds: float = 0.0
    calls: int = 0

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += clock() - began
                self.calls += 1

        clock = self.clock
        return timed

    def take(self) -> tuple[float, int]:
        """Seconds and calls; resets them."""
        taken = self.seconds, self.calls
        self.seconds, self.calls = 0.0, 0
        return taken


@dataclass(frozen=True)
class Hooked:
    """A method of vLLM's that the plugin wraps, with the timers inside and outside of its hook."""

    owner: Any
    name: str
    original: Any
    inner: Timer = field(default_factory=Timer)
    outer: Timer = field(default_factory=Timer)
    # Around ``outer``: the difference between the two is what a timer costs in this place.
    spare: Timer = field(default_factory=Timer)

    def time_inside(self) -> None:
        """Before the plugin wraps the method."""
        setattr(self.owner, self.name, self.inner.around(self.original))

    def time_outside(self) -> Any:
        """Once the plugin has wrapped it; returns the hook."""
        hook = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.spare.around(self.outer.around(hook)))
        return hook

    def own(self) -> tuple[float, int]:
        """Seconds in the hook itself, without what the timers cost, and calls; resets the timers."""
        (outer_s, calls), (inner_s, _), (spare_s, _) = self.outer.take(), self.inner.take(), self.spare.take()
        return max((outer_s - inner_s) - (spare_s - outer_s), 0.0), calls


def timer_cost_s(clock: Callable[[], float], calls: int = 20_000) -> float:
    """What a timer adds to what is around it, a call."""
    timer = Timer(clock)
    empty = timer.around(lambda: None)
    began = time.perf_counter()
    for _ in range(calls):
        empty()
    return max((time.perf_counter() - began) / calls, 0.0)


@dataclass
class SenderTimers:
    """CPU time of the telemetry client's sending thread: all of it, and the parts spent on finished requests."""

    total: Timer = field(default_factory=lambda: Timer(time.thread_time))
    parts: tuple[Timer, ...] = field(default_factory=lambda: tuple(Timer(time.thread_time) for _ in range(4)))

    def install(self) -> None:
        """Before the client starts its thread."""
        from vllm_sloguard.hooks import stat_logger, telemetry_client
        from vllm_sloguard.hooks.telemetry_client import TelemetryClient as Client

        event, encode, batch, send = self.parts
        telemetry_client._encoded = encode.around(telemetry_client._encoded)  # pyright: ignore[reportPrivateUsage]
        stat_logger.finished_event = event.around(stat_logger.finished_event)
        Client._next_batch = batch.around(Client._next_batch)  # pyright: ignore[reportPrivateUsage]
        Client._send = send.around(Client._send)  # pyright: ignore[reportPrivateUsage]
        Client._tick = self.total.around(Client._tick)  # pyright: ignore[reportPrivateUsage]

    def take(self) -> tuple[float, float]:
        """Seconds for steps and seconds for requests since the last call."""
        total_s, parts = self.total.take()[0], [part.take() for part in self.parts]
        requests_s = sum(seconds for seconds, _ in parts)
        # Half of a timer's own time is inside what it measures, half outside.
        timers_s = timer_cost_s(time.thread_time) * sum(calls for _, calls in parts)
        return max(total_s - requests_s - timers_s / 2, 0.0), max(requests_s - timers_s / 2, 0.0)


def print_hook_failures() -> None:
    """Has the plugin print the traceback of each exception in a hook."""
    from vllm_sloguard.hooks import plugin

    original = plugin.hook_failed

    def hook_failed(name: str, error: Exception) -> None:
        traceback.print_exception(error)
        original(name, error)

    plugin.hook_failed = hook_failed


def install_core_timers() -> None:
    """Gives the engine core its timers and its switch; to be called in its process or in the one it is forked from."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    schedule = Hooked(Scheduler, "schedule", Scheduler.schedule)
    schedule.time_inside()
    kept: dict[str, Any] = {}

    def installed(_core: Any) -> dict[str, bool]:
        live = any(thread.name == "sloguard-live" for thread in threading.enumerate())
        return {"schedule": getattr(Scheduler.schedule, "sloguard", False), "live_thread": live}

    def switch(_core: Any, on: bool) -> None:
        kept.setdefault("hook", Scheduler.schedule)
        Scheduler.schedule = kept["hook"] if on else schedule.original

    def costs(_core: Any) -> dict[str, float]:
        if "hook" not in kept:
            kept["hook"] = schedule.time_outside()
        spent_s, calls = schedule.own()
        now = time.process_time(), _thread_cpu_s("sloguard-live")
        before, kept["at"] = kept.get("at", now), now
        return {"schedule_s": spent_s, "calls": calls, "cpu_s": now[0] - before[0], "live_s": now[1] - before[1]}

    core: Any = EngineCore
    core.sloguard_installed, core.sloguard_switch, core.sloguard_costs = installed, switch, costs


def _thread_cpu_s(name: str) -> float:
    """CPU time of this process's threads of that name."""
    clocks = [time.pthread_getcpuclockid(t.ident) for t in threading.enumerate() if t.name == name and t.ident]
    return sum(map(time.clock_gettime, clocks))
