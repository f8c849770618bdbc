"""Knobs that change in a running engine: what a change is, whether it is valid, and whether it has taken effect.

Pure: no vLLM, no I/O; the time is an argument, in monotonic seconds. A knob's value is a whole number, 0 or 1 for a
switch. Two threads of an engine core share ``LiveRecord``: the one that talks to the sidecar, and vLLM's own.
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple

SEQS = "max_num_seqs"
TOKENS = "max_num_batched_tokens"
LONG_PREFILL = "long_prefill_token_threshold"
PREFIX_CACHING = "enable_prefix_caching"
RESERVE = "scheduler_reserve_full_isl"

Targets = Mapping[str, int]


@dataclass(frozen=True)
class Range:
    """What a knob was started with, and the values that it may take from there, inclusive."""

    started: int
    lowest: int
    highest: int


@dataclass(frozen=True)
class LiveTargets:
    """The complete target state: a knob that ``targets`` does not name goes back to what the engine was started with.

    ``epoch`` and ``number`` say whose change it is and which; ``settle`` empties the caches before the next request
    that finds the engine idle; after ``lease_s`` seconds without an answer of its controller the change is undone.
    """

    epoch: int
    number: int
    targets: Targets
    settle: bool = False
    lease_s: float = 10.0


class Step(NamedTuple):
    """What one step of the scheduler has done; requests are counted as it ends.

    ``piece_tokens`` is the longest piece of one request, where a prompt is among them, else 0. ``lookups`` are the
    admitted requests that looked into the prefix cache, None where that is not counted. ``reserved`` says whether the
    KV cache was asked for the whole prompt of a request, None where none was asked for.
    """

    running: int
    waiting: int
    admitted: int
    tokens: int
    piece_tokens: int = 0
    lookups: int | None = None
    queries: int = 0
    hits: int = 0
    reserved: bool | None = None


class LiveVerdict(IntEnum):
    """Whether a knob's new value has been seen at work; the numbers are those of the wire."""

    OPEN = 1
    OBEYED = 2
    SHOWN = 3


class LiveState(IntEnum):
    """The state of a change; the numbers are those of the wire."""

    ACCEPTED = 1
    APPLIED = 2
    REFUSED = 3
    EXPIRED = 4


@dataclass(frozen=True)
class Effect:
    """One knob that changes from ``before`` to ``target``; ``seconds`` from the change's receipt to the verdict."""

    before: int
    target: int
    verdict: LiveVerdict = LiveVerdict.OPEN
    seconds: float | None = None
    seen: str = ""


@dataclass
class Counters:
    """Over the first steps since a change was applied. Only the engine's own thread adds to it."""

    steps: int = 0
    most_running: int = 0
    most_tokens: int = 0
    queries: int = 0
    hits: int = 0
    counts_lookups: bool = False

    def add(self, step: Step) -> None:
        """Counts ``step``."""
        self.steps += 1
        self.most_running = max(self.most_running, step.running)
        self.most_tokens = max(self.most_tokens, step.tokens)
        self.queries += step.queries
        self.hits += step.hits
        self.counts_lookups = step.lookups is not None


@dataclass(frozen=True)
class LiveProgress:
    """The progress of one change."""

    change: LiveTargets
    state: LiveState
    received_at: float
    refusal: str = ""
    applied_s: float | None = None
    settled_s: float | None = None
    effects: Mapping[str, Effect] = field(default_factory=dict[str, Effect])
    counters: Counters = field(default_factory=Counters)

    def pending(self) -> bool:
        """Whether something remains to be applied or observed."""
        if self.state in (LiveState.REFUSED, LiveState.EXPIRED):
            return False
        unsettled = self.change.settle and self.settled_s is None
        return self.applied_s is None or unsettled or any(e.verdict is LiveVerdict.OPEN for e in self.effects.values())


def live_verdict(name: str, before: int, target: int, step: Step) -> LiveVerdict:
    """What ``step``, which was scheduled under ``target``, shows of it.

    SHOWN is what the value ``before`` does not explain. OBEYED is a step whose load does not tell the two apart.
    """
    return _VERDICTS[name](before, target, step) if step.tokens else LiveVerdict.OPEN


def live_evidence(name: str, target: int, step: Step) -> str:
    """What the verdict on ``step`` rests on, in words."""
    if name == SEQS:
        return f"{step.running} ran, {step.waiting} waited"
    if name == TOKENS:
        return f"{step.tokens} tokens, {step.waiting} requests waited"
    if name == LONG_PREFILL:
        return f"{step.piece_tokens} tokens of one prompt"
    if name == RESERVE:
        return f"asked for {'the whole prompt' if target else 'one piece'}"
    if step.lookups is None:
        return f"{step.admitted} requests admitted"
    return f"{step.lookups} looked into the cache, {step.admitted} were admitted"


def _seqs(before: int, target: int, step: Step) -> LiveVerdict:
    return _limit(before, target, step.running, step.waiting > 0)


def _tokens(before: int, target: int, step: Step) -> LiveVerdict:
    # Prompts and waiting requests take what they get; answers alone need a token each.
    return _limit(before, target, step.tokens, step.waiting > 0 or step.piece_tokens > 0)


def _long_prefill(before: int, target: int, step: Step) -> LiveVerdict:
    # vLLM does not split the prompt of a request that is alone.
    if not step.piece_tokens or step.running + step.waiting < 2:
        return LiveVerdict.OPEN
    return _limit(before or math.inf, target or math.inf, step.piece_tokens, wants_more=True)


def _prefix_caching(_before: int, target: int, step: Step) -> LiveVerdict:
    if step.lookups is None:
        return LiveVerdict.OBEYED if step.admitted else LiveVerdict.OPEN
    shown = step.lookups > 0 if target else step.admitted > 0 and step.lookups == 0
    return LiveVerdict.SHOWN if shown else LiveVerdict.OPEN


def _reserve(_before: int, target: int, step: Step) -> LiveVerdict:
    asked = step.reserved is not None and step.reserved == bool(target)
    return LiveVerdict.SHOWN if asked else LiveVerdict.OPEN


_VERDICTS: Mapping[str, Callable[[int, int, Step], LiveVerdict]] = {
    SEQS: _seqs,
    TOKENS: _tokens,
    LONG_PREFILL: _long_prefill,
    PREFIX_CACHING: _prefix_caching,
    RESERVE: _reserve,
}


def _limit(before: float, target: float, amount: int, wants_more: bool) -> LiveVerdict:
    if amount > target:
        return LiveVerdict.OPEN  # it comes down as requests finish
    if target < before:
        return LiveVerdict.SHOWN if amount == target and wants_more else LiveVerdict.OBEYED
    if amount > before:
        return LiveVerdict.SHOWN
    # Just the former limit, with more to do: it looks as if that one held.
    return LiveVerdict.OPEN if amount == before and wants_more else LiveVerdict.OBEYED


def live_refusal(targets: Targets, ranges: Mapping[str, Range], cold: Mapping[str, str]) -> str:
    """Why ``targets`` can't be in an engine with these live knobs; empty when they can."""
    for name, value in targets.items():
        if name not in ranges:
            return f"{name} is not live in this engine: {cold.get(name, 'no such live knob')}"
        allowed = ranges[name]
        if not allowed.lowest <= value <= allowed.highest:
            return f"{name}: {value} is not from {allowed.lowest} to {allowed.highest}, which this engine can take"
    values = {**{name: r.started for name, r in ranges.items()}, **targets}
    if SEQS in values and values.get(TOKENS, math.inf) < values[SEQS]:
        return f"{TOKENS}: {values[TOKENS]} is below {SEQS}, {values[SEQS]}"
    return ""


class LiveRecord:
    """The change in force in an engine core, and its progress."""

    def __init__(self, ranges: Mapping[str, Range], cold: Mapping[str, str]) -> None:
        self.ranges = dict(ranges)
        self.cold = dict(cold)
        # Grows with each change that the sidecar has yet to be sent.
        self.revision = 0
        self._moved = threading.Condition()
        self._epoch = 0
        self._answered_at = 0.0
        self._in_force: LiveProgress | None = None
        self._last: LiveProgress | None = None

    def receive(self, change: LiveTargets, now: float) -> None:
        """Accepts or refuses ``change``; a repeated one is ignored."""
        with self._moved:
            if self._last is not None and _key(self._last.change) == _key(change):
                return
            why = live_refusal(change.targets, self.ranges, self.cold)
            if change.epoch < self._epoch:
                why = f"epoch {change.epoch} is that of an earlier controller than {self._epoch}"
            self._epoch = max(self._epoch, change.epoch)
            self._last = LiveProgress(change, LiveState.REFUSED if why else LiveState.ACCEPTED, now, why)
            if not why:
                self._in_force, self._answered_at = self._last, now
            self._tell()

    def answered(self, epoch: int, now: float) -> None:
        """The controller of ``epoch`` has answered, which renews the lease of its change."""
        with self._moved:
            self._epoch = max(self._epoch, epoch)
            if self._in_force is not None and self._in_force.change.epoch == epoch:
                self._answered_at = now

    def lapsed(self, now: float) -> None:
        """Undoes the change whose controller has been silent for longer than its lease."""
        with self._moved:
            held = self._in_force
            if held is None or held.state is LiveState.EXPIRED or now - self._answered_at <= held.change.lease_s:
                return
            self._update(replace(held, state=LiveState.EXPIRED))

    def broken(self, why: str) -> None:
        """Makes every knob cold: nothing changes in this engine any more."""
        with self._moved:
            self.cold |= dict.fromkeys(self.ranges, why)
            self.ranges = {}
            if self._in_force is not None:
                self._update(replace(self._in_force, state=LiveState.REFUSED, refusal=why))

    def in_force(self) -> LiveProgress | None:
        """The last change that was accepted."""
        return self._in_force

    def last(self) -> LiveProgress | None:
        """The last change received, accepted or not: the one that is reported."""
        return self._last

    def pending(self) -> bool:
        """Whether the change in force is still to be applied or verified by the engine's steps."""
        held = self._in_force
        return held is not None and held.pending()

    def targets(self, progress: LiveProgress) -> dict[str, int]:
        """Every live knob's target under ``progress``."""
        undone = progress.state in (LiveState.REFUSED, LiveState.EXPIRED)
        wanted = progress.change.targets
        return {name: r.started if undone else wanted.get(name, r.started) for name, r in self.ranges.items()}

    def applied(self, progress: LiveProgress, before: Targets, now: float) -> None:
        """The next step is scheduled under ``progress``; ``before`` is what was in force until now."""
        with self._moved:
            if self._in_force is not progress:
                return  # another came meanwhile
            wanted = self.targets(progress)
            effects = {name: Effect(before[name], wanted[name]) for name in wanted if wanted[name] != before[name]}
            applied_s = now - progress.received_at
            self._update(replace(progress, state=LiveState.APPLIED, applied_s=applied_s, effects=effects))

    def settled(self, now: float) -> None:
        """The caches have been emptied."""
        with self._moved:
            if self._in_force is not None:
                settled_s = now - self._in_force.received_at
                self._update(replace(self._in_force, settled_s=settled_s))

    def on_step(self, step: Step, now: float) -> None:
        """Takes one step that was scheduled under the change in force."""
        held = self._in_force
        if held is None or held.state is not LiveState.APPLIED:
            return
        held.counters.add(step)  # of this thread alone
        if not any(_stronger(name, effect, step) for name, effect in held.effects.items()):
            return
        with self._moved:
            if self._in_force is not held:
                return  # another came meanwhile
            seconds = now - held.received_at
            effects = {name: _after(name, effect, step, seconds) for name, effect in held.effects.items()}
            self._update(replace(held, effects=effects))

    def wait(self, revision: int, timeout_s: float) -> None:
        """Waits until the revision differs from ``revision``, for at most ``timeout_s`` seconds."""
        with self._moved:
            self._moved.wait_for(lambda: self.revision != revision, timeout_s)

    def _update(self, progress: LiveProgress) -> None:
        if self._last is self._in_force:
            self._last = progress
        self._in_force = progress
        self._tell()

    def _tell(self) -> None:
        self.revision += 1
        self._moved.notify_all()


def _key(change: LiveTargets) -> tuple[int, int]:
    return change.epoch, change.number


def _stronger(name: str, effect: Effect, step: Step) -> bool:
    """Whether ``step`` shows more of the knob than the verdict says."""
    if effect.verdict is LiveVerdict.SHOWN:
        return False
    return live_verdict(name, effect.before, effect.target, step) > effect.verdict


def _after(name: str, effect: Effect, step: Step, seconds: float) -> Effect:
    """``effect`` with what ``step`` shows; the first verdict stays, but for a stronger one."""
    if not _stronger(name, effect, step):
        return effect
    found = live_verdict(name, effect.before, effect.target, step)
    return replace(effect, verdict=found, seconds=seconds, seen=live_evidence(name, effect.target, step))
