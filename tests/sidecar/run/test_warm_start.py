"""The unmeasured start before a validation: forked if possible, and whose crash counts."""

from collections.abc import Callable
from typing import cast

import pytest

from sidecar.measure.load_schedule import Loads, LoadSchedule, WarmStartLoad
from sidecar.record.trial import Plan, Role, StartKind
from sidecar.run.raw_trial import EngineRun, RawTrial
from sidecar.run.trial_runner import TrialRunner
from vllm_sloguard.crash import Category, Crash

OOM = Crash(Category.OUT_OF_MEMORY, "out_of_memory", "no memory", "startup", None)
FORKED_OK = EngineRun(None, StartKind.FORKED, True, start_s=2.0)
FORKED_CRASH = EngineRun(None, StartKind.FORKED, True, crash=OOM)
ORDINARY_OK = EngineRun(None, StartKind.ORDINARY, True, start_s=25.0)
ORDINARY_CRASH = EngineRun(None, StartKind.ORDINARY, True, crash=OOM)


class Scripted(TrialRunner):
    """Its engines do what ``ends`` says, one after another; ``starts`` are what was asked for: (warming, measured)."""

    def __init__(self, *ends: EngineRun) -> None:
        self.ends, self.starts = list(ends), list[tuple[bool, bool]]()

    def warm_up(self) -> None:
        """Nothing to start."""

    def _attempt(
        self, plan: Plan, schedule: Loads, cancelled: Callable[[], bool], *, exact: bool, measured: bool = True
    ) -> EngineRun:
        assert exact
        self.starts.append((isinstance(schedule, WarmStartLoad), measured))
        return self.ends.pop(0)

    def validate(self) -> RawTrial:
        """A validation's first run of its side."""
        plan = Plan(Role.VALIDATION, {}, {}, "", "")
        return self.run(plan, cast(LoadSchedule, None), lambda: False, warm_start=True)


@pytest.mark.parametrize(
    ("ends", "starts", "crashed", "last"),
    [
        ((FORKED_OK, ORDINARY_OK), [(True, False), (False, True)], False, ORDINARY_OK),
        ((ORDINARY_OK, ORDINARY_CRASH), [(True, False), (False, True)], True, ORDINARY_CRASH),
        ((FORKED_CRASH, ORDINARY_OK, ORDINARY_OK), [(True, False), (True, True), (False, True)], False, ORDINARY_OK),
        ((FORKED_CRASH, ORDINARY_CRASH), [(True, False), (True, True)], True, ORDINARY_CRASH),
        ((ORDINARY_CRASH,), [(True, False)], True, ORDINARY_CRASH),
    ],
    ids=["forked", "measured crash", "the fork's own crash", "crash in both", "crash"],
)
def test_only_the_crash_of_an_ordinary_start_counts(
    ends: tuple[EngineRun, ...], starts: list[tuple[bool, bool]], crashed: bool, last: EngineRun
) -> None:
    runner = Scripted(*ends)

    raw = runner.validate()

    assert runner.starts == starts
    assert runner.ends == []
    assert (raw.last, raw.last.crash is not None) == (last, crashed)
