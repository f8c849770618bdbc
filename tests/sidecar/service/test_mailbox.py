"""Aborts reach the window they were meant for, and a retune that arrives while one ends opens the next."""

from pathlib import Path

from sidecar.record.action_queue import ActionKind, ActionOutcome, ActionQueue, Door, Sender
from sidecar.record.journal import Journal
from sidecar.service.mailbox import Mailbox

ALICE = Sender(Door.CLI, "alice")


def test_an_abort_after_the_end_of_a_window_does_not_end_the_next_one() -> None:
    mailbox = Mailbox()
    mailbox.begin_window()
    assert mailbox.abort_window(1)
    assert mailbox.end_window() == [1]

    assert not mailbox.abort_window(2)
    mailbox.abort.set()  # as by a signal that was on its way
    mailbox.begin_window()

    assert not mailbox.abort.is_set()
    assert mailbox.end_window() == []


def test_a_retune_accepted_while_a_window_ends_is_carried_out_after_it(tmp_path: Path) -> None:
    actions = ActionQueue(Journal(tmp_path))
    actions.accept(ActionKind.RETUNE, ALICE)
    first = actions.begin_retune()
    assert first is not None
    actions.accept(ActionKind.RETUNE, ALICE)
    actions.end(first.id, ActionOutcome.DONE, "kept: no clear winner")

    second = actions.begin_retune()

    assert second is not None
    assert second.id == first.id + 1
