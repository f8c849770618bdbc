"""Live knob changes: a gRPC service that the plugin polls, and the calls that make a change.

A change is the complete desired state of an engine's live knobs: a knob it does not name returns to its start value.
Either all data-parallel engine cores apply a change, or none does.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from vllm_sloguard.knobs import KNOBS, KnobKind, KnobValues, Value
from vllm_sloguard.live_knobs import LiveVerdict, Range, Targets, live_refusal
from vllm_sloguard.wire import live_pb2 as pb
from vllm_sloguard.wire.live_pb2_grpc import LiveServiceServicer

LEASE_S = 10.0

_MAX_ENGINES = 8
_LONGEST_WAIT_S = 5.0
_REVERT_S = 2.0


class LiveError(RuntimeError):
    """A live change failed; the text names the knob or engine and the reason."""


@dataclass(frozen=True)
class Capabilities:
    """Which live knobs every core of an engine can change, and why the others can't.

    ``current`` is the state in the core that reported last.
    """

    ranges: Mapping[str, Range]
    cold: Mapping[str, str]
    current: Targets


@dataclass(frozen=True)
class KnobEffect:
    """One changed knob. ``seconds`` run from the engine's receipt of the change to the verdict, in the slowest core;
    None while pending. ``seen`` is the evidence for the verdict.
    """

    before: int
    target: int
    verdict: LiveVerdict
    seconds: float | None
    seen: str


@dataclass(frozen=True)
class Effects:
    """The effects of a change over all cores of the engine; seconds are the slowest core's, None while pending.

    A knob that did not change has no entry. What is counted is so since the change was applied, and up to a second old:
    ``most_running`` and ``most_tokens`` are those of one core; the prefix
    cache's counts, in tokens, are sums, None where vLLM keeps no statistics.
    """

    applied_s: float | None
    settled_s: float | None
    knobs: Mapping[str, KnobEffect]
    steps: int
    most_running: int
    most_tokens: int
    prefix_queries: int | None
    prefix_hits: int | None

    def verified(self) -> bool:
        """Whether every core has scheduled a step under the change, and no knob is still pending."""
        return self.applied_s is not None and all(k.verdict is not LiveVerdict.OPEN for k in self.knobs.values())


@dataclass
class _Core:
    """The last report of one engine core."""

    asked: pb.AwaitRequest
    polls: int = 0


@dataclass
class _Engine:
    cores_expected: int
    cores: dict[int, _Core] = field(default_factory=dict[int, _Core])
    change: pb.LiveChange | None = None


class LiveHub(LiveServiceServicer):
    """Delivers changes to the engines announced by ``expect``.

    ``epoch``, from the journal, must be higher than that of every earlier sidecar (``act_for``).
    """

    def __init__(self, epoch: int = 0, lease_s: float = LEASE_S) -> None:
        self._epoch = epoch
        self._lease_s = lease_s
        self._number = 0
        self._closed = False
        self._engines: OrderedDict[str, _Engine] = OrderedDict()
        self._moved = threading.Condition()

    def act_for(self, epoch: int) -> None:
        """Makes changes as the controller of ``epoch`` from now on."""
        with self._moved:
            self._epoch = epoch

    def expect(self, engine_id: str, cores: int = 1) -> None:
        """Accepts ``engine_id`` with ``cores`` data-parallel cores; the oldest engines are forgotten."""
        with self._moved:
            self._engines[engine_id] = _Engine(cores)
            while len(self._engines) > _MAX_ENGINES:
                self._engines.popitem(last=False)

    def close(self) -> None:
        """Releases every waiting call; to be called before the server is stopped."""
        with self._moved:
            self._closed = True
            self._moved.notify_all()

    def capabilities(self, engine_id: str, timeout_s: float) -> Capabilities:
        """What ``engine_id`` can change, once all its cores have reported. Raises LiveError on timeout."""
        with self._moved:
            engine = self._known(engine_id)
            if not self._moved.wait_for(lambda: len(engine.cores) >= engine.cores_expected, timeout_s):
                here = f"{len(engine.cores)} of {engine.cores_expected} cores"
                raise LiveError(f"{engine_id}: {here} have asked for live changes in {timeout_s:g} s")
            return _common([core.asked for core in engine.cores.values()])

    def change(self, engine_id: str, targets: Targets, timeout_s: float, *, settle: bool = False) -> Effects:
        """Makes ``targets`` the complete live state of ``engine_id``; returns when all its cores have accepted it.

        It applies from each core's next step. With ``settle`` the prefix cache is emptied before the next request that
        finds the engine idle. Raises LiveError, leaving the state unchanged, if a knob is not live there, a value is
        out of range, or a core refuses or does not answer within ``timeout_s`` seconds.
        """
        able = self.capabilities(engine_id, timeout_s)
        if why := live_refusal(targets, able.ranges, able.cold):
            raise LiveError(why)
        with self._moved:
            engine = self._known(engine_id)
            former = engine.change
            self._send(engine, targets, settle=settle)
            self._moved.wait_for(lambda: all(_taken(engine)) or any(_refusals(engine)), timeout_s)
            if all(_taken(engine)):
                return _effects(engine)
            why = next(filter(None, _refusals(engine)), f"a core did not answer in {timeout_s:g} s")
            self._send(engine, {} if former is None else {t.name: t.value for t in former.targets}, settle=False)
            self._moved.wait_for(lambda: all(_taken(engine)), _REVERT_S)
            raise LiveError(f"{engine_id}: {why}")

    def settle(self, engine_id: str, timeout_s: float) -> Effects:
        """Empties the caches as ``change`` does, without changing knobs."""
        with self._moved:
            change = self._known(engine_id).change
        return self.change(
            engine_id, {} if change is None else {t.name: t.value for t in change.targets}, timeout_s, settle=True
        )

    def effects(self, engine_id: str) -> Effects:
        """The effects of the last change so far. Raises LiveError if there was none, or it was undone."""
        with self._moved:
            return _effects(self._known(engine_id))

    def verified(self, engine_id: str, timeout_s: float) -> Effects:
        """The effects of the last change once verified and, if requested, settled, or after ``timeout_s`` seconds: an
        idle engine shows no effect. Raises LiveError if there was none, or it was undone.
        """
        with self._moved:
            engine = self._known(engine_id)

            def done() -> bool:
                effects = _effects(engine)
                asked = engine.change is not None and engine.change.settle
                return effects.verified() and (effects.settled_s is not None or not asked)

            self._moved.wait_for(done, timeout_s)
            return _effects(engine)

    def Await(self, request: pb.AwaitRequest, context: grpc.ServicerContext) -> pb.AwaitResponse:  # noqa: N802
        """Takes a core's report, and answers with the next change, if any."""
        with self._moved:
            engine = self._engines.get(request.engine_id)
            if engine is None:
                context.abort(grpc.StatusCode.NOT_FOUND, f"engine_id: {request.engine_id[:80]!r} is not running here")
            assert engine is not None
            if request.engine_index >= engine.cores_expected:
                allowed = f"below {engine.cores_expected}"
                context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, f"engine_index: {request.engine_index} is not {allowed}"
                )
            core = engine.cores.setdefault(request.engine_index, _Core(request))
            core.asked = request
            core.polls += 1
            mine = core.polls
            self._moved.notify_all()
            # A newer call from the same core supersedes this one.
            self._moved.wait_for(
                lambda: self._closed or core.polls != mine or _news(engine, request),
                min(max(0.0, request.wait_seconds), _LONGEST_WAIT_S),  # in this order NaN becomes 0
            )
            return pb.AwaitResponse(epoch=self._epoch, change=engine.change if _news(engine, request) else None)

    def _known(self, engine_id: str) -> _Engine:
        if engine_id not in self._engines:
            raise LiveError(f"{engine_id}: this engine is not running here")
        return self._engines[engine_id]

    def _send(self, engine: _Engine, targets: Targets, *, settle: bool) -> None:
        self._number += 1
        engine.change = pb.LiveChange(
            epoch=self._epoch,
            change_id=self._number,
            targets=[pb.LiveTarget(name=name, value=value) for name, value in targets.items()],
            settle=settle,
            lease_seconds=self._lease_s,
        )
        self._moved.notify_all()


def _news(engine: _Engine, request: pb.AwaitRequest) -> bool:
    """Whether there is a change that the core sending ``request`` has not reported on."""
    return engine.change is not None and not _reports_on(request.report, engine.change)


def _reports_on(report: pb.LiveReport, change: pb.LiveChange) -> bool:
    return (report.epoch, report.change_id) == (change.epoch, change.change_id)


def _reports(engine: _Engine) -> list[pb.LiveReport | None]:
    """Each core's report of the last change."""
    assert engine.change is not None
    asked = [engine.cores[i].asked if i in engine.cores else None for i in range(engine.cores_expected)]
    return [a.report if a is not None and _reports_on(a.report, engine.change) else None for a in asked]


def _taken(engine: _Engine) -> list[bool]:
    taken = (pb.LIVE_STATE_ACCEPTED, pb.LIVE_STATE_APPLIED)
    return [report is not None and report.state in taken for report in _reports(engine)]


def _refusals(engine: _Engine) -> list[str]:
    return [report.refusal if report is not None else "" for report in _reports(engine)]


def _effects(engine: _Engine) -> Effects:
    if engine.change is None:
        raise LiveError("no live change was made in this engine")
    reports = [report for report in _reports(engine) if report is not None]
    if any(report.state == pb.LIVE_STATE_EXPIRED for report in reports):
        raise LiveError("the live change was undone: the engine lost contact for longer than the lease")
    if why := next((report.refusal for report in reports if report.refusal), ""):
        raise LiveError(why)
    complete = len(reports) == engine.cores_expected
    counters = [report.counters for report in reports]
    counted = complete and all(c.HasField("prefix_cache_queries") for c in counters)
    return Effects(
        applied_s=_slowest(reports, "applied_seconds", complete=complete),
        settled_s=_slowest(reports, "settled_seconds", complete=complete),
        knobs=_knob_effects(reports),
        steps=sum(c.steps for c in counters),
        most_running=max((c.most_running_requests for c in counters), default=0),
        most_tokens=max((c.most_scheduled_tokens for c in counters), default=0),
        prefix_queries=sum(c.prefix_cache_queries for c in counters) if counted else None,
        prefix_hits=sum(c.prefix_cache_hits for c in counters) if counted else None,
    )


def _slowest(messages: list[Any], name: str, *, complete: bool = True) -> float | None:
    """The largest value of the field ``name``; None if a message lacks it."""
    if not complete or not messages or not all(message.HasField(name) for message in messages):
        return None
    return max(getattr(message, name) for message in messages)


def _knob_effects(reports: list[pb.LiveReport]) -> dict[str, KnobEffect]:
    """The weakest verdict of all cores, by knob."""
    found: dict[str, list[pb.LiveEffect]] = {}
    for report in reports:
        for effect in report.effects:
            found.setdefault(effect.name, []).append(effect)
    effects: dict[str, KnobEffect] = {}
    for name, of_cores in found.items():
        weakest = min(of_cores, key=lambda effect: _verdict(effect.verdict))
        seconds = _slowest(of_cores, "seconds")
        effects[name] = KnobEffect(weakest.before, weakest.target, _verdict(weakest.verdict), seconds, weakest.seen)
    return effects


def _verdict(number: int) -> LiveVerdict:
    """Unknown numbers count as pending."""
    return LiveVerdict(number) if number in set(LiveVerdict) else LiveVerdict.OPEN


def _common(asked: list[pb.AwaitRequest]) -> Capabilities:
    """The capabilities that all cores share."""
    cold = {knob.name: knob.reason for request in asked for knob in request.cold}
    ranges: dict[str, Range] = {}
    for request in asked:
        for knob in request.knobs:
            known = ranges.get(knob.name, Range(knob.started, knob.lowest, knob.highest))
            ranges[knob.name] = Range(known.started, max(known.lowest, knob.lowest), min(known.highest, knob.highest))
    current = {knob.name: knob.current for request in asked for knob in request.knobs}
    return Capabilities({name: r for name, r in ranges.items() if name not in cold}, cold, current)


def live_targets(started: KnobValues, wanted: KnobValues, able: Capabilities) -> dict[str, int] | None:
    """The targets for ``LiveHub.change`` that make an engine started with ``started`` serve as if with ``wanted``.

    Both are engine arguments after repair. None if that needs a restart: another argument differs, a value is out of
    the engine's range, or one side leaves a differing knob to vLLM's default, which is unknown.
    """
    targets: dict[str, int] = {}
    for name in {**started, **wanted}:
        if name not in wanted:
            return None
        value = wanted[name]
        if name in able.ranges and type(value) is (bool if KNOBS[name].kind is KnobKind.CATEGORICAL else int):
            targets[name] = int(value)
        elif name not in started or not _same(started[name], value):
            return None
    return None if live_refusal(targets, able.ranges, able.cold) else targets


def reachable(started: KnobValues, wanted: KnobValues, able: Capabilities) -> bool:
    """Whether the engine started with ``started`` can switch to ``wanted`` without a restart."""
    return live_targets(started, wanted, able) is not None


def _same(one: Value, other: Value) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)
