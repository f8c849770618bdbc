"""The state derived from pauses, windows, promotions and rollbacks, across sidecar restarts."""

from pathlib import Path

import pytest

from sidecar.record.events import EventKind, Operations, WindowOutcome
from sidecar.record.journal import Journal, JournalError, Superseded


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


@pytest.fixture
def operations(journal: Journal) -> Operations:
    return Operations(journal, "base")


def test_a_pause_holds_until_it_is_taken_back_and_outlives_the_sidecar(tmp_path: Path, operations: Operations) -> None:
    assert operations.paused() is None
    operations.record(EventKind.PAUSED, reason="release week")

    later = Operations(Journal(tmp_path), "base")
    paused = later.paused()
    assert paused is not None
    assert paused.reason == "release week"
    later.record(EventKind.RESUMED)
    assert operations.paused() is None


def test_another_reason_for_a_pause_is_kept_and_the_pause_stays_as_old_as_it_is(
    journal: Journal, operations: Operations
) -> None:
    for reason in ("of an earlier pause", "", "release week", "audit"):
        operations.record(EventKind.PAUSED, reason=reason)
        if reason == "of an earlier pause":
            operations.record(EventKind.RESUMED)
    journal.write("UPDATE events SET at = id", ())

    paused = operations.paused()

    assert paused is not None
    assert (paused.at, paused.reason) == (3, "audit")


@pytest.mark.parametrize(
    ("outcome", "decision", "shown"),
    [
        ("kept", "inconclusive", "kept (inconclusive)"),
        ("kept", "worse", "kept (candidate worse)"),
        ("kept", "kept (worse)", "kept (candidate worse)"),  # as sloguard 0.1 wrote it
        ("promoted", "promoted", "promoted"),
        ("out_of_time", "", "out of time"),
    ],
)
def test_a_window_says_what_its_run_says(operations: Operations, outcome: str, decision: str, shown: str) -> None:
    operations.record(EventKind.WINDOW_ENDED, outcome=outcome, reason="noise", decision=decision)
    operations.record(EventKind.WINDOW_ENDED, outcome=outcome, reason="of an older sloguard")

    new, old = operations.events([EventKind.WINDOW_ENDED])

    assert (new.outcome, old.outcome) == (shown, outcome.replace("_", " "))


def test_a_refused_window_does_not_hide_a_failed_one(operations: Operations) -> None:
    operations.record(EventKind.WINDOW_ENDED, outcome=WindowOutcome.FAILED, reason="no disk")
    operations.record(EventKind.WINDOW_ENDED, outcome=WindowOutcome.REFUSED, reason="too soon")

    last = operations.last_window()

    assert last is not None
    assert (last.content["outcome"], last.reason) == ("failed", "no disk")


def test_a_restore_takes_as_long_as_the_longest_of_the_last_starts_of_these_arguments(operations: Operations) -> None:
    assert operations.longest_start_s() is None
    operations.record(EventKind.START, base="base", promotion=None, seconds=99.0)
    for _ in range(10):
        operations.record(EventKind.START, base="base", promotion=None, seconds=20.0)
    operations.record(EventKind.START, base="another", promotion=None, seconds=50.0)

    assert operations.longest_start_s() == 20.0


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (EventKind.WINDOW_ENDED, {"reason": "no disk"}),
        (EventKind.WINDOW_ENDED, {"outcome": 5}),
        (EventKind.START, {"base": "base", "promotion": 1}),
        (EventKind.START, {"base": "base", "promotion": 1, "seconds": "long"}),
        (EventKind.START, {"base": "base", "promotion": 1, "seconds": 10**400}),
        (EventKind.PROBATION, {"reason": "it has passed"}),
    ],
)
def test_a_damaged_event_is_one_line(operations: Operations, kind: EventKind, content: dict[str, object]) -> None:
    operations.record(kind, **content)
    with pytest.raises(JournalError, match=f"the journal is damaged: {kind}: ") as caught:
        operations.events([kind])

    assert "\n" not in str(caught.value)


def test_each_rollback_goes_one_promotion_further_back(journal: Journal, operations: Operations) -> None:
    for seqs in (4, 8):
        journal.promote(None, "base", {"max_num_seqs": seqs})
    journal.promote(None, "another", {"max_num_seqs": 16})
    served: list[object] = [journal.promoted("base")]
    for promotion in (2, 2, 1):
        operations.roll_back(promotion, "bad")
        served.append(journal.promoted("base"))

    assert served == [{"max_num_seqs": 8}, {"max_num_seqs": 4}, {"max_num_seqs": 4}, None]
    assert operations.current() is None
    assert [p.args["max_num_seqs"] for p in operations.quarantined()] == [4, 8]
    assert journal.promoted("another") == {"max_num_seqs": 16}


def test_a_promotion_after_a_rollback_returns_to_what_was_not_rolled_back(
    journal: Journal, operations: Operations
) -> None:
    for seqs in (4, 8):
        journal.promote(None, "base", {"max_num_seqs": seqs})
    operations.roll_back(2, "bad")
    journal.promote(None, "base", {"max_num_seqs": 12})
    assert journal.promoted("base") == {"max_num_seqs": 12}

    operations.roll_back(3, "bad")

    assert journal.promoted("base") == {"max_num_seqs": 4}


def test_a_stale_controller_writes_nothing(tmp_path: Path) -> None:
    first, second = Journal(tmp_path), Journal(tmp_path)
    assert first.take_over(1) == 1
    first.enter("serving", "first")
    assert second.take_over(2) == 2

    for write in (
        lambda: first.enter("draining", "stale"),
        lambda: first.promote(None, "base", {}),
        lambda: Operations(first, "base").record(EventKind.PAUSED),
        first.still_mine,
    ):
        with pytest.raises(Superseded, match="epoch 2, this one has 1"):
            write()

    second.enter("starting", "second")
    assert [s.reason for s in second.states()] == ["first", "second"]
    assert second.promoted("base") is None


def test_what_is_damaged_is_said(journal: Journal, operations: Operations) -> None:
    journal.write("INSERT INTO events (at, kind, content) VALUES (1, 'paused', '{')", ())

    with pytest.raises(JournalError, match="the journal is damaged: event"):
        operations.paused()


def test_a_pause_before_a_scheduled_window_wins(operations: Operations) -> None:
    assert operations.record_opened(3600.0, reason="the window has opened")
    operations.record(EventKind.WINDOW_ENDED, outcome=WindowOutcome.KEPT, reason="", first_due=3600.0, last_due=3600.0)
    operations.record(EventKind.PAUSED, reason="release week")

    assert not operations.record_opened(7200.0, reason="the window has opened")

    assert operations.open_window() is None
    # One that an operator asked for has begun before the pause, which says so.
    assert operations.record_opened(None, reason="a window was requested")
    assert operations.handled_windows() == [(3600.0, 3600.0), (3600.0, 3600.0)]
