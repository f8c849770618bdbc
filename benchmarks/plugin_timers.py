"""Timers around vLLM's methods and the plugin's hooks on them, for ``plugin_cost.py``. vLLM is imported where used."""

import functools
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spent:
    """Time spent in one place, in seconds: by the clock, and of the thread's CPU time; and how often."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    calls: int = 0

    def minus(self, other: "Spent") -> "Spent":
        """The difference of the times, at least 0."""
        return Spent(max(self.wall_s - other.wall_s, 0.0), max(self.cpu_s - other.cpu_s, 0.0), self.calls)

    def plus(self, other: "Spent") -> "Spent":
        """The sum of the times."""
        return Spent(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s, self.calls)


class Timer:
    """Time spent in one method."""

    def __init__(self) -> None:
        self._wall_s = self._cpu_s = 0.0
        self._calls = 0

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, timed."""
        wall, cpu = time.perf_counter, time.thread_time

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            wall_began, cpu_began = wall(), cpu()
            try:
                return method(*args, **kwargs)
            finally:
                self._cpu_s += cpu() - cpu_began
                self._wall_s += wall() - wall_began
                self._calls += 1

        return timed

    def take(self) -> Spent:
        """What was spent since the last call."""
        taken = Spent(self._wall_s, self._cpu_s, self._calls)
        self._wall_s = self._cpu_s = 0.0
        self._calls = 0
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
        setattr(self.owner, self.name, self.around(hook))
        return hook

    def around(self, hook: Any) -> Any:
        """``hook`` between its timers."""
        return self.spare.around(self.outer.around(hook))

    def own(self) -> tuple[Spent, int]:
        """What the hook itself took, without what the timers cost, and how often vLLM's method ran; resets both."""
        outer, inner, spare = self.outer.take(), self.inner.take(), self.spare.take()
        return outer.minus(inner).minus(spare.minus(outer)), inner.calls


def timer_cost_s(calls: int = 20_000) -> float:
    """The CPU time that a timer adds to what is around it, a call."""
    empty = Timer().around(lambda: None)
    began = time.thread_time()
    for _ in range(calls):
        empty()
    return max((time.thread_time() - began) / calls, 0.0)


@dataclass
class SenderTimers:
    """CPU time of the telemetry client's sending thread: all of it, and the parts spent on finished requests."""

    total: Timer = field(default_factory=Timer)
    parts: tuple[Timer, ...] = field(default_factory=lambda: tuple(Timer() for _ in range(4)))

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
        total_s, parts = self.total.take().cpu_s, [part.take() for part in self.parts]
        requests_s = sum(part.cpu_s for part in parts)
        # Half of a timer's own time is inside what it measures, half outside.
        timers_s = timer_cost_s() * sum(part.calls for part in parts)
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
        return {"scheduler": hasattr(_core.scheduler, "sloguard_live"), "live_thread": live}

    def timed(core: Any) -> None:
        live = core.scheduler.sloguard_live
        kept.setdefault("hook", live._hook)
        live._hook = schedule.around(kept["hook"])

    def switch(core: Any, on: bool) -> None:
        live, scheduler = core.scheduler.sloguard_live, core.scheduler
        live._hook = kept.setdefault("hook", live._hook)
        if on and live.record.in_force() is not None:
            scheduler.schedule = live._hook
        else:
            scheduler.__dict__.pop("schedule", None)

    def costs(_core: Any) -> dict[str, float]:
        spent, steps = schedule.own()
        now = time.process_time(), _thread_cpu_s("sloguard-live")
        before, kept["at"] = kept.get("at", now), now
        return {
            "schedule_s": spent.wall_s,
            "schedule_cpu_s": spent.cpu_s,
            "hooked": spent.calls,
            "steps": steps,
            "cpu_s": now[0] - before[0],
            "live_s": now[1] - before[1],
        }

    core: Any = EngineCore
    core.sloguard_installed, core.sloguard_timed = installed, timed
    core.sloguard_switch, core.sloguard_costs = switch, costs


def _thread_cpu_s(name: str) -> float:
    """CPU time of this process's threads of that name."""
    clocks = [time.pthread_getcpuclockid(t.ident) for t in threading.enumerate() if t.name == name and t.ident]
    return sum(map(time.clock_gettime, clocks))
