"""Operators' orders: none is lost, and every one gets an outcome."""

from pathlib import Path

import pytest

from sidecar.record.events import Operations
from sidecar.record.journal import Journal
from sidecar.record.orders import Door, OrderKind, OrderOutcome, Orders, Sender

ALICE = Sender(Door.CLI, "alice")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


def outcomes(orders: Orders) -> list[tuple[OrderKind, OrderOutcome]]:
    return [(order.kind, order.outcome) for order in orders.recent()]


def test_a_retune_is_carried_out_once_and_keeps_who_asked(journal: Journal) -> None:
    orders = Orders(journal)
    orders.accept(OrderKind.RETUNE, ALICE, 90.0)
    assert orders.waiting()

    order = orders.begin_retune()

    assert order is not None
    assert (order.sender, order.duration_s) == (ALICE, 90.0)
    assert (orders.begin_retune(), orders.waiting()) == (None, False)
    orders.end(order.id, OrderOutcome.DONE, "kept: no clear winner")
    [ended] = orders.recent()
    assert (ended.outcome, ended.result) == (OrderOutcome.DONE, "kept: no clear winner")
    assert ended.ended_at is not None


def test_a_pause_cancels_a_retune_that_has_not_started(journal: Journal) -> None:
    orders = Orders(journal)
    orders.accept(OrderKind.RETUNE, ALICE)

    assert orders.pause(Sender(Door.PAGE), "release week") == (1, False)

    assert orders.begin_retune() is None
    assert outcomes(orders) == [
        (OrderKind.RETUNE, OrderOutcome.CANCELLED),
        (OrderKind.PAUSE, OrderOutcome.DONE),
    ]
    paused = Operations(journal, "base").paused()
    assert paused is not None
    assert paused.reason == "release week"


def test_a_pause_after_the_start_says_so(journal: Journal) -> None:
    orders = Orders(journal)
    orders.accept(OrderKind.RETUNE, ALICE)
    orders.begin_retune()

    assert orders.pause(ALICE, "") == (0, True)


def test_a_pause_during_a_scheduled_window_says_so(journal: Journal) -> None:
    Operations(journal, "base").record_opened(3600.0, reason="the window has opened")

    assert Orders(journal).pause(ALICE, "") == (0, True)


def test_a_later_sidecar_carries_out_a_fresh_retune_and_ends_the_rest(journal: Journal, tmp_path: Path) -> None:
    orders = Orders(journal)
    for _ in range(3):
        orders.accept(OrderKind.RETUNE, ALICE)
    orders.begin_retune()
    journal.write("UPDATE orders SET at = at - 301 WHERE id = 2", ())
    orders.accept(OrderKind.ABORT, ALICE)

    later = Orders(Journal(tmp_path))
    later.take_over()

    assert [order.outcome for order in later.recent()] == [
        OrderOutcome.EXPIRED,
        OrderOutcome.EXPIRED,
        OrderOutcome.PENDING,
        OrderOutcome.EXPIRED,
    ]
    left = later.begin_retune()
    assert left is not None
    assert left.id == 3
