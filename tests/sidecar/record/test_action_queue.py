"""Operators' actions: none is lost, and every one gets an outcome."""

from pathlib import Path

import pytest

from sidecar.record.action_queue import ActionKind, ActionOutcome, ActionQueue, Door, Sender
from sidecar.record.events import Operations
from sidecar.record.journal import Journal

ALICE = Sender(Door.CLI, "alice")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


def outcomes(actions: ActionQueue) -> list[tuple[ActionKind, ActionOutcome]]:
    return [(action.kind, action.outcome) for action in actions.recent()]


def test_a_retune_is_carried_out_once_and_keeps_who_asked(journal: Journal) -> None:
    actions = ActionQueue(journal)
    actions.accept(ActionKind.RETUNE, ALICE, 90.0)
    assert actions.waiting()

    action = actions.begin_retune()

    assert action is not None
    assert (action.sender, action.duration_s) == (ALICE, 90.0)
    assert (actions.begin_retune(), actions.waiting()) == (None, False)
    actions.end(action.id, ActionOutcome.DONE, "kept: no clear winner")
    [ended] = actions.recent()
    assert (ended.outcome, ended.result) == (ActionOutcome.DONE, "kept: no clear winner")
    assert ended.ended_at is not None


def test_a_pause_cancels_a_retune_that_has_not_started(journal: Journal) -> None:
    actions = ActionQueue(journal)
    actions.accept(ActionKind.RETUNE, ALICE)

    assert actions.pause(Sender(Door.PAGE), "release week") == (1, False)

    assert actions.begin_retune() is None
    assert outcomes(actions) == [
        (ActionKind.RETUNE, ActionOutcome.CANCELLED),
        (ActionKind.PAUSE, ActionOutcome.DONE),
    ]
    paused = Operations(journal, "base").paused()
    assert paused is not None
    assert paused.reason == "release week"


def test_a_pause_after_the_start_says_so(journal: Journal) -> None:
    actions = ActionQueue(journal)
    actions.accept(ActionKind.RETUNE, ALICE)
    actions.begin_retune()

    assert actions.pause(ALICE, "") == (0, True)


def test_a_pause_during_a_scheduled_window_says_so(journal: Journal) -> None:
    Operations(journal, "base").record_opened(3600.0, reason="the window has opened")

    assert ActionQueue(journal).pause(ALICE, "") == (0, True)


def test_a_later_sidecar_carries_out_a_fresh_retune_and_ends_the_rest(journal: Journal, tmp_path: Path) -> None:
    actions = ActionQueue(journal)
    for _ in range(3):
        actions.accept(ActionKind.RETUNE, ALICE)
    actions.begin_retune()
    journal.write("UPDATE orders SET at = at - 301 WHERE id = 2", ())
    actions.accept(ActionKind.ABORT, ALICE)

    later = ActionQueue(Journal(tmp_path))
    later.take_over()

    assert [action.outcome for action in later.recent()] == [
        ActionOutcome.EXPIRED,
        ActionOutcome.EXPIRED,
        ActionOutcome.PENDING,
        ActionOutcome.EXPIRED,
    ]
    left = later.begin_retune()
    assert left is not None
    assert left.id == 3
