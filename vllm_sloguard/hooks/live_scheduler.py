"""Live knobs in vLLM's scheduler: which can change there, and changing them between steps, on vLLM's own thread.

The fields are those of vllm/v1/core/sched/scheduler.py and kv_cache_manager.py, tested with 0.26 and 0.32. A limit is
never set below the number of running requests or above its value at the start. After any error the values of the start
are restored and nothing is changed again.
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_sloguard.knobs import KNOBS
from vllm_sloguard.live_knobs import (
    LONG_PREFILL,
    PREFIX_CACHING,
    RESERVE,
    SEQS,
    TOKENS,
    LiveProgress,
    LiveRecord,
    LiveState,
    LiveTargets,
    LiveVerdict,
    Range,
    Step,
    Targets,
)

# Once a change is verified and this many steps were counted, it costs nothing any more.
_MAX_FOLLOWED = 2_000


@dataclass(frozen=True)
class Lever:
    """How one knob is read and set in a scheduler. ``floor`` is the lowest value that is safe now."""

    allowed: Range
    read: Callable[[], int]
    write: Callable[[int], None]
    floor: Callable[[], int] = lambda: 0


class NotLive(RuntimeError):  # noqa: N818 - it names what is found
    """A knob of the table that can't change in this engine; the text says why."""


def levers(scheduler: Any, version: tuple[int, int]) -> tuple[dict[str, Lever], dict[str, str]]:
    """The live knobs of ``scheduler``, and why the other knobs of the table need a restart there."""
    found: dict[str, Lever] = {}
    cold: dict[str, str] = {}
    for name, build in _BUILDERS.items():
        live = KNOBS[name].live
        if live is None or not live.in_version(version):
            cold[name] = f"it was not tested with vLLM {version[0]}.{version[1]}"
            continue
        try:
            found[name] = build(scheduler)
        except NotLive as why:
            cold[name] = str(why)
        except AttributeError as error:
            cold[name] = f"this vLLM is another than it should be: {error}"
    return found, cold


def _seqs(scheduler: Any) -> Lever:
    # 0.32 has a limit of its own for what is admitted; before, one limit is that and what the workers have room for.
    name = "max_num_active_reqs" if hasattr(scheduler, "max_num_active_reqs") else "max_num_running_reqs"
    started = int(getattr(scheduler, name))
    # vLLM asserts at the end of each step that no more run than this.
    return _field(scheduler, name, Range(started, 1, started), lambda: len(scheduler.running))


def _tokens(scheduler: Any) -> Lever:
    config = scheduler.scheduler_config
    _refuse_uneven_prompts(scheduler)
    if scheduler.vllm_config.speculative_config is not None:
        raise NotLive("speculative decoding takes a part of each step")
    if scheduler.vllm_config.model_config.is_multimodal_model:
        raise NotLive("an image or a sound may have to fit into one step")
    started = int(scheduler.max_num_scheduled_tokens)
    if started != config.max_num_batched_tokens:
        raise NotLive("max_num_scheduled_tokens is set")
    # Without chunked prefill the longest prompt must fit into one step, or it never runs.
    lowest = 1 if config.enable_chunked_prefill else min(int(scheduler.max_model_len), started)
    allowed = Range(started, lowest, started)
    return _field(scheduler, "max_num_scheduled_tokens", allowed, lambda: len(scheduler.running))


def _long_prefill(scheduler: Any) -> Lever:
    config = scheduler.scheduler_config
    _refuse_uneven_prompts(scheduler)
    if getattr(scheduler, "adaptive_long_prefill_threshold", False):
        raise NotLive("long_prefill_token_threshold_adaptive is on")
    allowed = Range(int(config.long_prefill_token_threshold), 0, int(scheduler.max_model_len))
    return _field(config, "long_prefill_token_threshold", allowed)


def _refuse_uneven_prompts(scheduler: Any) -> None:
    if scheduler.vllm_config.model_config.runner_type != "generate":
        raise NotLive("the model does not generate")
    if scheduler.need_mamba_block_aligned_split:
        raise NotLive("Mamba's state is kept where a piece of a prompt ends")


def _prefix_caching(scheduler: Any) -> Lever:
    manager = scheduler.kv_cache_manager
    if not manager.enable_caching:
        raise NotLive("the engine was started with it off")
    if scheduler.connector is not None:
        raise NotLive("a KV connector has a cache of its own")
    if scheduler.has_mamba_layers:
        raise NotLive("Mamba's state is laid out for it")
    # Not the block pool's: it must still clear a block's hash before the block is reused.
    owners = [manager, *(m for m in manager.coordinator.single_type_managers if m.enable_caching)]

    def write(value: int) -> None:
        for owner in owners:
            owner.enable_caching = bool(value)

    return Lever(Range(1, 0, 1), lambda: int(manager.enable_caching), write)


def _reserve(scheduler: Any) -> Lever:
    attention = scheduler.vllm_config.attention_config
    if getattr(attention, "hisparse_config", None) is not None:
        raise NotLive("HiSparse needs it on")
    started = int(scheduler.scheduler_reserve_full_isl)

    def write(value: int) -> None:
        scheduler.scheduler_reserve_full_isl = bool(value)

    return Lever(Range(started, 0, 1), lambda: int(scheduler.scheduler_reserve_full_isl), write)


def _field(owner: Any, name: str, allowed: Range, floor: Callable[[], int] = lambda: 0) -> Lever:
    return Lever(allowed, lambda: int(getattr(owner, name)), lambda value: setattr(owner, name, value), floor)


_BUILDERS: Mapping[str, Callable[[Any], Lever]] = {
    SEQS: _seqs,
    TOKENS: _tokens,
    LONG_PREFILL: _long_prefill,
    PREFIX_CACHING: _prefix_caching,
    RESERVE: _reserve,
}


class LiveScheduler:
    """Applies the change in force before each step, and records what the step did.

    The scheduler's ``schedule`` is hooked only while there is something to apply or to observe. ``reset_encoder``
    empties the encoder's caches, where the model has one; ``guard`` keeps what a hook raises from vLLM.
    """

    def __init__(
        self,
        scheduler: Any,
        version: tuple[int, int],
        reset_encoder: Callable[[], None] | None,
        guard: Callable[[Callable[..., None]], Callable[..., None]] = lambda hook: hook,
    ) -> None:
        self._scheduler = scheduler
        self._reset_encoder = reset_encoder
        self._hook = self._hooked(scheduler.schedule, guard)
        self._levers, cold = levers(scheduler, version)
        self.record = LiveRecord({name: lever.allowed for name, lever in self._levers.items()}, cold)
        # The change, and its state, that the levers reflect.
        self._done: tuple[int, LiveState] | None = None
        self._approaching = False
        self._lookups: tuple[int, int, int] | None = None
        self._reserved: bool | None = None
        self._spying = False

    def current(self) -> dict[str, int]:
        """Every live knob's value in force."""
        return {name: lever.read() for name, lever in self._levers.items()}

    def receive(self, change: LiveTargets, now: float) -> None:
        """Takes a change. On the thread that talks to the sidecar."""
        self.record.receive(change, now)
        if self._levers and self.record.in_force() is not None:
            self._scheduler.schedule = self._hook

    def lapsed(self, now: float) -> None:
        """Has the next step undo a change whose lease is over. On the thread that talks to the sidecar."""
        self.record.lapsed(now)
        if not self._over(self.record.in_force()):
            self._scheduler.schedule = self._hook

    def _hooked(self, schedule: Callable[..., Any], guard: Callable[..., Callable[..., None]]) -> Callable[..., Any]:
        before, after = guard(self.before_step), guard(self.after_step)

        @functools.wraps(schedule)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            before()
            output = schedule(*args, **kwargs)
            after(output)
            return output

        return hooked

    def before_step(self) -> None:
        """Called before each step is scheduled."""
        if not self._levers:
            return
        try:
            self._apply()
            self._settle()
            self._lookups = self._prefix_cache_counts()
            self._watch_reserve()
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")
            raise

    def after_step(self, output: Any) -> None:
        """Called with what the step has scheduled."""
        if self._spying:
            self._spying = False
            del self._scheduler.kv_cache_manager.allocate_slots
        held = self.record.in_force()
        if self._levers and held is not None and held.state is LiveState.APPLIED:
            self.record.on_step(self._step(output), time.monotonic())
            if held.counters.steps < _MAX_FOLLOWED:
                return
        if self._over(self.record.in_force()):
            self._scheduler.__dict__.pop("schedule", None)
            # The other thread may have hooked it again since.
            if not self._over(self.record.in_force()):
                self._scheduler.schedule = self._hook

    def _over(self, held: LiveProgress | None) -> bool:
        """Whether nothing is left to be applied or observed."""
        if not self._levers or held is None:
            return True
        if self._done != (id(held.change), held.state) or self._approaching:
            return False
        if held.state is LiveState.APPLIED:
            return held.counters.steps >= _MAX_FOLLOWED and not held.pending()
        return held.state is LiveState.EXPIRED

    def _apply(self) -> None:
        held = self.record.in_force()
        if held is None:
            return
        if self._done == (id(held.change), held.state) and not self._approaching:
            return
        before = self.current()
        self._approaching = self._write(self.record.targets(held))
        if held.state is LiveState.ACCEPTED:
            self.record.applied(held, before, time.monotonic())
        self._done = id(held.change), LiveState.APPLIED if held.state is LiveState.ACCEPTED else held.state

    def _write(self, wanted: Targets) -> bool:
        """Sets each lever as close to its target as is safe now; returns whether one has not reached it."""
        held_back = False
        for name, lever in self._levers.items():
            value = min(max(wanted[name], lever.floor()), lever.allowed.highest)
            held_back = held_back or value != wanted[name]
            if value != lever.read():
                lever.write(value)
        return held_back

    def _settle(self) -> None:
        """Empties the caches once nothing runs."""
        scheduler = self._scheduler
        held = self.record.in_force()
        if held is None or held.state is not LiveState.APPLIED or not held.change.settle:
            return
        if held.settled_s is not None or scheduler.running:
            return
        if scheduler.reset_prefix_cache(reset_connector=scheduler.connector is not None):
            if self._reset_encoder is not None:
                self._reset_encoder()
            self.record.settled(time.monotonic())

    def _give_up(self, why: str) -> None:
        self.record.broken(why)
        self._levers, started = {}, self._levers
        for lever in started.values():
            lever.write(max(lever.allowed.started, lever.floor()))

    def _prefix_cache_counts(self) -> tuple[int, int, int] | None:
        """Lookups, tokens looked up, and tokens found, since vLLM last took them; None where it keeps none."""
        stats = self._scheduler.kv_cache_manager.prefix_cache_stats
        return None if stats is None else (stats.requests + stats.preempted_requests, stats.queries, stats.hits)

    def _watch_reserve(self) -> None:
        """Observes what the next step asks of the KV cache, until the change has been verified."""
        held = self.record.in_force()
        effect = held.effects.get(RESERVE) if held is not None else None
        if effect is None or effect.verdict is LiveVerdict.SHOWN:
            return
        manager = self._scheduler.kv_cache_manager
        original = manager.allocate_slots

        @functools.wraps(original)
        def allocate_slots(*args: Any, **kwargs: Any) -> Any:
            if "full_sequence_must_fit" in kwargs:
                self._reserved = bool(kwargs["full_sequence_must_fit"])
            return original(*args, **kwargs)

        self._reserved, self._spying = None, True
        manager.allocate_slots = allocate_slots

    def _step(self, output: Any) -> Step:
        running, waiting = self._scheduler.get_request_counts()
        counts = self._prefix_cache_counts()
        lookups, queries, hits = None, 0, 0
        if counts is not None and self._lookups is not None:
            lookups, queries, hits = (now - before for now, before in zip(counts, self._lookups, strict=True))
        admitted = len(output.scheduled_new_reqs)
        tokens, scheduled = output.total_num_scheduled_tokens, output.num_scheduled_tokens
        # In most steps every request gets one token.
        longest = 1 if tokens == len(scheduled) else max(scheduled.values(), default=0)
        # A decoding request takes one token a step, plus those of speculative decoding.
        is_prompt = admitted > 0 or longest > 1 + self._scheduler.num_spec_tokens
        return Step(
            running,
            waiting,
            admitted,
            tokens,
            longest if is_prompt else 0,
            lookups,
            queries,
            hits,
            self._reserved,
        )
