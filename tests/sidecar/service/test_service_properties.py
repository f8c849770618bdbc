"""The service's states and the queue of actions under any sequence of actions, clock jumps, crashes and restarts.

The loop, the window, the queue and the journal are the real ones; the engine is left out. SLOGUARD_PROPERTIES sets the
number of sequences, for a deeper run.
"""

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import pytest
from engine_bench import write_config
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from sidecar.config.schema import Config, load_config
from sidecar.engine.engine import Cancelled
from sidecar.observe.telemetry import TelemetryHub
from sidecar.observe.user_requests import Record
from sidecar.record.action_queue import ActionKind, ActionOutcome, ActionQueue, OperatorAction
from sidecar.record.decisions import Decision, Outcome
from sidecar.record.events import EventKind, Operations, WindowOutcome
from sidecar.record.journal import Journal
from sidecar.record.states import TRANSITIONS, Cause, State
from sidecar.service.control_rpc import Control
from sidecar.service.loop import Service
from sidecar.service.mailbox import Mailbox
from sidecar.service.parts import ServiceParts
from sidecar.service.tuning_window import TuningWindow
from vllm_sloguard.wire import control_pb2 as pb

_EXAMPLES = int(os.environ.get("SLOGUARD_PROPERTIES", "25"))
_HOUR = 3600.0
_DURATION_S = 2400.0
_LATENESS_S = _DURATION_S / 4
_START = datetime.fromisoformat("2026-03-02T02:30:00").timestamp()
_OPEN = (ActionOutcome.PENDING, ActionOutcome.STARTED)
_UNOPENED = (WindowOutcome.REFUSED, WindowOutcome.MISSED)

Step = tuple[str, float]
_steps = st.lists(
    st.tuples(
        st.sampled_from(["pass", "pass", "retune", "pause", "resume", "abort", "jump", "fail", "crash"]),
        st.floats(-2 * _HOUR, 5 * _HOUR),
    ),
    max_size=4,
)


class _KilledError(BaseException):
    """The sidecar is killed at this point."""


class _RefusedOrderError(RuntimeError):
    """an action was refused."""


class _Context:
    """The gRPC context of a local client."""

    def peer(self) -> str:
        return "unix:"

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("sloguard-user", "alice"),)

    def abort(self, _code: object, text: str) -> NoReturn:
        raise _RefusedOrderError(text)


class _Anything:
    """A part that takes any call and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: None


class _Engine:
    """Stands in for the serving engine, which is always up."""

    mismatch = ""
    promotion = None
    restore_s = 0.0
    hooks = _Anything()

    def __init__(self, service: "_Loop") -> None:
        self._service = service

    def recover(self) -> None:
        self._service.progress.enter(State.STARTING, Cause.STARTED, "the sidecar has started")
        self._service.progress.enter(State.SERVING, Cause.STARTED, "it is up")

    def alive(self) -> bool:
        return True

    def outdated(self) -> bool:
        return False

    def doubtful(self) -> bool:
        return False

    def probe(self) -> bool:
        return True

    def rate(self) -> float | None:
        return None

    def record(self) -> Record:
        return Record(0, 0, None, 0.0, 0.0, None, None)


class _Window(TuningWindow):
    """A window without an engine: between its states, ``meanwhile`` gives actions and moves the clock."""

    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    def _drain(self, cause: Cause, why: str) -> None:
        self._progress.enter(State.DRAINING, cause, why)
        self.meanwhile()
        if self._stopped():
            outcome, reason = self._given_up()
            self._progress.enter(State.SERVING, Cause.WINDOW_ABORTED, f"{outcome}: {reason}")
            raise Cancelled

    def _tune(self) -> Decision:
        self._progress.enter(State.TUNING, Cause.DRAINED, "drained")
        self.meanwhile()
        if self._stopped():
            raise Cancelled
        return Decision(Outcome.KEPT, "no better one")

    def _come_back(self, outcome: WindowOutcome, reason: str) -> tuple[WindowOutcome, str]:
        if not self._progress.serves():
            self._progress.enter(State.RESTORING, Cause.KEPT, reason)
            self._progress.enter(State.SERVING, Cause.KEPT, f"{reason}; it is up")
        return outcome, reason


class _Loop(Service):
    """The loop, one cycle at a time."""

    def __init__(self, config: Config, parts: ServiceParts) -> None:
        super().__init__(config, parts, say=lambda _: None, notify=lambda _: None)
        self.on_schedule: Callable[[], None] = lambda: None
        engine: Any = _Engine(self)
        self._serving = engine
        self._watch: Any = _Anything()
        self._hooks: Any = _Anything()
        self.window = self._window = _Window(
            config, parts, self.progress, engine, lambda _: None, journal_restore=self._journal_restore
        )

    def begin(self) -> None:
        self._begin()

    def cycle(self) -> None:
        self._cycle()

    def _open_due(self) -> bool:
        self.on_schedule()
        return super()._open_due()


class ServiceMachine(RuleBasedStateMachine):
    """One state folder over the lives of several sidecars."""

    config: Config

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="sloguard-properties-"))
        self.now = _START
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(time, "time", lambda: self.now)
        self.script: Iterator[Step] = iter(())
        self.running = False
        self.settled: dict[int, OperatorAction] = {}
        self.accepted: set[int] = set()
        # When windows are due: from each start or jump back on.
        self.stretches: list[list[float]] = []

    def teardown(self) -> None:
        self.patch.undo()
        self.journal.close()
        shutil.rmtree(self.folder)

    # A sidecar's life

    @initialize()
    def start(self) -> None:
        self.config = type(self).config.model_copy(update={"state": self.folder})
        self.journal = Journal(self.folder)
        self.requests = Mailbox()
        hub = TelemetryHub()
        self.operations = Operations(self.journal, self.config.base_digest())
        nothing: Any = _Anything()
        parts = ServiceParts(self.journal, self.operations, nothing, nothing, nothing, hub, nothing, self.requests)
        self.loop = _Loop(self.config, parts)
        self.control = Control(self.config, self.requests, hub)
        self.loop.window.meanwhile = self._meanwhile
        self.loop.on_schedule = self._reach
        if not self.stretches:
            self.stretches.append([self.now, self.now])
        self.loop.begin()
        self.running = True

    @rule(steps=_steps)
    def cycle(self, steps: list[Step]) -> None:
        """One cycle of the loop; ``steps`` happen during the window that may open in it."""
        if not self.running:
            self.start()
        self.script = iter(steps)
        try:
            self.loop.cycle()
        except _KilledError:
            self.kill()

    @rule()
    def kill(self) -> None:
        """Nothing is ended in action; another sidecar may start later."""
        if self.running:
            self.running = False
            self.journal.close()
            self.journal = Journal(self.folder)
            self.operations = Operations(self.journal, self.config.base_digest())

    # Time

    @rule(seconds=st.one_of(st.floats(0, 120), st.floats(0, 3 * _HOUR), st.floats(-3 * _HOUR, 30 * _HOUR)))
    def move_clock(self, seconds: float) -> None:
        self.now += seconds
        if seconds < 0:
            self.stretches.append([self.now, self.now])

    @rule(early_s=st.floats(-30, 30))
    def move_to_a_window(self, early_s: float) -> None:
        self.move_clock(_HOUR - self.now % _HOUR + early_s)

    def _reach(self) -> None:
        """The loop looks at the schedule: up to now, no window may be without a record afterwards."""
        self.stretches[-1][1] = max(self.stretches[-1][1], self.now)

    # ActionQueue

    @rule(name=st.sampled_from(["retune", "pause", "resume", "abort"]))
    def action(self, name: str) -> None:
        if not self.running:
            return
        context: Any = _Context()
        with suppress(_RefusedOrderError):
            match name:
                case "retune":
                    self.control.Retune(pb.RetuneRequest(duration_seconds=600, force=True), context)
                    self.accepted.add(ActionQueue(self.journal).recent()[-1].id)
                case "pause":
                    said = self.control.Pause(pb.PauseRequest(reason="release"), context).summary
                    if self.requests.state is State.SERVING:
                        assert "in progress" not in said
                case "resume":
                    self.control.Resume(pb.ResumeRequest(), context)
                case _:
                    self.control.Abort(pb.AbortRequest(), context)

    def _meanwhile(self) -> None:
        for name, value in self.script:
            match name:
                case "pass":
                    return
                case "jump":
                    self.now += value
                    if value < 0:
                        self.stretches.append([self.now, self.now])
                case "fail":
                    raise OSError("the disk is full")
                case "crash":
                    raise _KilledError
                case _:
                    self.action(name)

    # What must hold

    @invariant()
    def an_outcome_is_final(self) -> None:
        actions = {action.id: action for action in ActionQueue(self.journal).recent()}
        for number, action in self.settled.items():
            assert actions.get(number, action) == action
        self.settled |= {number: action for number, action in actions.items() if action.outcome not in _OPEN}
        assert self.accepted <= actions.keys()
        if self.running:
            assert [o.kind for o in actions.values() if o.outcome is ActionOutcome.STARTED] == []
            assert {o.kind for o in actions.values() if o.outcome is ActionOutcome.PENDING} <= {ActionKind.RETUNE}

    @invariant()
    def the_journal_and_the_loop_agree(self) -> None:
        if not self.running:
            return
        state = self.journal.state()
        assert state is not None
        assert (state.state, self.requests.state, self.loop.progress.state) == (State.SERVING,) * 3
        assert self.operations.open_window() is None

    @invariant()
    def transitions_are_those_of_the_table(self) -> None:
        states = [State(record.state) for record in self.journal.states()]
        for before, after in pairwise(states):
            # After a kill, the next sidecar starts from anywhere.
            assert after in TRANSITIONS[before].successors or after is State.STARTING

    @invariant()
    def windows_open_once_unpaused_and_one_at_a_time(self) -> None:
        events = self.operations.events([*EventKind])
        paused = is_open = False
        due: Counter[float] = Counter()
        for event in events:
            if event.kind in (EventKind.PAUSED, EventKind.RESUMED):
                paused = event.kind is EventKind.PAUSED
            elif event.kind is EventKind.WINDOW_OPENED:
                assert not is_open
                assert not paused
                is_open = True
                if (at := event.content["due"]) is not None:
                    due[at] += 1
                    assert 0 <= event.at - at <= _LATENESS_S
            elif event.kind is EventKind.WINDOW_ENDED and event.content["outcome"] not in _UNOPENED:
                assert is_open
                is_open = False
        assert not due or max(due.values()) == 1

    @invariant()
    def no_window_is_lost(self) -> None:
        if not self.running:
            return
        events = self.operations.events([EventKind.WINDOW_OPENED, EventKind.WINDOW_ENDED])
        opened = {event.content.get("due") for event in events if event.kind is EventKind.WINDOW_OPENED}
        unopened = [
            (event.content["first_due"], event.content["last_due"])
            for event in events
            if event.content.get("first_due") is not None
        ]
        for began, ended in self.stretches:
            for hour in range(int(began // _HOUR) + 1, int(ended // _HOUR) + 1):
                at = hour * _HOUR
                assert at in opened or any(first <= at <= last for first, last in unopened), datetime.fromtimestamp(at)


def test_no_sequence_of_orders_jumps_and_crashes_breaks_an_invariant(tmp_path: Path) -> None:
    window = {"cron": "0 * * * *", "duration": f"{_DURATION_S:g}s", "notice": "0s"}
    ServiceMachine.config = load_config(write_config(tmp_path, window=window))
    run_state_machine_as_test(
        ServiceMachine,
        settings=settings(
            max_examples=_EXAMPLES,
            stateful_step_count=20,
            deadline=None,
            derandomize=_EXAMPLES <= 25,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@contextmanager
def retuned_before_a_due_window(tmp_path: Path, *, make_up: bool) -> Generator[ServiceMachine]:
    """The machine at 02:55 with a requested window, five minutes before a scheduled one is due."""
    window = {"cron": "0 * * * *", "duration": f"{_DURATION_S:g}s", "notice": "0s", "make_up": make_up}
    ServiceMachine.config = load_config(write_config(tmp_path, window=window))
    machine = ServiceMachine()
    try:
        machine.start()
        machine.move_clock(25 * 60)  # 02:55
        machine.action("retune")
        yield machine
    finally:
        machine.teardown()


def test_a_missed_window_is_made_up_for_by_a_later_sidecar(tmp_path: Path) -> None:
    with retuned_before_a_due_window(tmp_path, make_up=True) as machine:
        machine.cycle([("jump", 20 * 60), ("pause", 0.0), ("pass", 0.0)])  # 03:00 is missed, and then it is paused
        machine.cycle([])
        machine.kill()
        machine.start()
        machine.action("resume")
        for _ in range(2):
            machine.cycle([])
        opened = machine.operations.events([EventKind.WINDOW_OPENED])

    assert [event.content["due"] for event in opened] == [None, _START + 30 * 60]


@pytest.mark.parametrize("make_up", [False, True])
def test_a_window_missed_because_another_one_ran_is_recorded_and_made_up_for(tmp_path: Path, make_up: bool) -> None:
    with retuned_before_a_due_window(tmp_path, make_up=make_up) as machine:
        machine.cycle([("jump", 20 * 60), ("pass", 0.0)])  # the requested window runs over 03:00
        for _ in range(2):
            machine.cycle([])
        opened = machine.operations.events([EventKind.WINDOW_OPENED])
        [missed] = [
            event.content
            for event in machine.operations.events([EventKind.WINDOW_ENDED])
            if event.content["outcome"] == WindowOutcome.MISSED
        ]

    due = _START + 30 * 60
    assert (missed["first_due"], missed["last_due"]) == (due, due)
    assert "03:00" in missed["reason"]
    assert "the sidecar was draining" in missed["reason"]
    assert [event.content["due"] for event in opened] == [None, due] if make_up else [None]
