"""Each invariant of the agent's campaign can fail, and its faults are those of the matrix."""

import re
from dataclasses import replace

import pytest
from agent_faults import AGENT_FAULTS
from agent_invariants import AgentRun, HeldBy, ObservedTrial, violations

from sidecar.record.trial import TrialStatus

FEASIBLE, RUNNING, CRASHED = (
    ObservedTrial(status) for status in (TrialStatus.FEASIBLE, TrialStatus.RUNNING, TrialStatus.CRASHED)
)
FINE = AgentRun(
    struck=True,
    before={(1, 0): FEASIBLE, (1, 1): RUNNING},
    after={(1, 0): FEASIBLE, (1, 1): FEASIBLE},
    back_s=1.0,
    settled_s=2.0,
    free_starts=[True, True],
    holders=[HeldBy("a", 1), HeldBy("a", 2), HeldBy("b", 1)],
    expected_holder="b",
)


def test_a_run_without_a_violation() -> None:
    assert violations(FINE) == []
    assert violations(replace(FINE, after={**FINE.after, (1, 2): CRASHED}, engine_killed=True)) == []


@pytest.mark.parametrize(
    ("run", "violation"),
    [
        (replace(FINE, struck=False), "no effect"),
        (replace(FINE, back_s=None), "nothing served"),
        (replace(FINE, settled_s=None), "not serving"),
        (replace(FINE, after={(1, 1): FEASIBLE}), r"trial \(1, 0\) is lost"),
        (replace(FINE, after={**FINE.after, (1, 1): RUNNING}), r"trial \(1, 1\) still runs"),
        (replace(FINE, after={**FINE.after, (1, 1): CRASHED}), r"trial \(1, 1\) counts as a crash"),
        (replace(FINE, free_starts=[True, False]), "while another one was running"),
        (replace(FINE, holders=[HeldBy("b", 2), HeldBy("b", 1)]), "epoch 1 had the agent after epoch 2"),
        (replace(FINE, holders=[HeldBy("b", 1), HeldBy("a", 1), HeldBy("b", 2)]), "journal b took the agent back"),
        (replace(FINE, expected_holder="a"), "not with journal a in the end"),
    ],
)
def test_each_invariant_can_fail(run: AgentRun, violation: str) -> None:
    [found] = violations(run)
    assert re.search(violation, found)


def test_the_result_of_a_trial_must_not_change() -> None:
    run = replace(FINE, before={(1, 0): ObservedTrial(TrialStatus.FEASIBLE, result="before")})  # type: ignore[arg-type]
    assert violations(run) == ["the result of trial (1, 0) has changed"]


@pytest.mark.parametrize("words", ["sidecar killed", "agent killed", "engine killed", "cut", "half-closed", "slow"])
def test_the_matrix_is_covered(words: str) -> None:
    assert [name for name in AGENT_FAULTS if words in name]
