"""A journal that is locked by another process, not writable, or deleted under a running sidecar."""

import sqlite3
import stat
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from sidecar.record.events import EventKind, Operations, WindowOutcome
from sidecar.record.journal import JOURNAL_FILE, Journal
from sidecar.record.journal_file import JournalLocked


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path)
    made.patience_s = 0.3
    return made


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Locks the journal as another process would."""
    with closing(sqlite3.connect(folder / JOURNAL_FILE, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


def test_a_lock_is_waited_for_once_and_not_with_each_write(journal: Journal, tmp_path: Path) -> None:
    with locked(tmp_path):
        began = time.monotonic()
        with pytest.raises(JournalLocked, match="locked"):
            journal.write("DELETE FROM states", ())
        assert time.monotonic() - began >= 0.3
        began = time.monotonic()
        for _ in range(5):
            with pytest.raises(JournalLocked):
                journal.write("DELETE FROM states", ())
        assert time.monotonic() - began < 3
    journal.write("DELETE FROM states", ())


def test_what_is_deferred_is_written_later_in_order_with_its_time(journal: Journal, tmp_path: Path) -> None:
    operations = Operations(journal, "base")
    with locked(tmp_path):
        assert journal.enter("restoring", "the engine crashed") is not None
        at = time.time()
        assert operations.record_or_defer(EventKind.CRASH, promotion=None, reason="engine_death") is not None
        assert not journal.caught_up()
    journal.enter("serving", "it is up")

    assert [state.state for state in journal.states()] == ["restoring", "serving"]
    [crash] = operations.events([EventKind.CRASH])
    assert abs(crash.at - at) < 0.2
    journal.caught_up()
    assert journal.caught_up()


def test_a_wait_for_a_lock_can_be_given_up(journal: Journal, tmp_path: Path) -> None:
    journal.patience_s, journal.give_up = 600.0, lambda: True
    with locked(tmp_path), pytest.raises(JournalLocked):
        journal.write("DELETE FROM states", ())


@pytest.mark.parametrize("names", [["-wal", "-shm"], ["-wal"], ["-shm"], [""], ["", "-wal", "-shm"]])
def test_files_that_are_deleted_are_noticed_and_restored(journal: Journal, tmp_path: Path, names: list[str]) -> None:
    for number in range(50):
        journal.enter("serving", f"state {number}")
    assert journal.missing() == []
    for name in names:
        (tmp_path / f"{JOURNAL_FILE}{name}").unlink()

    assert journal.missing() == [f"{JOURNAL_FILE}{name}" for name in names]
    journal.restore_files()

    assert journal.missing() == []
    journal.enter("serving", "afterwards")
    with closing(Journal(tmp_path)) as other:
        assert len(other.states()) == 51
        assert other.read("SELECT integrity_check AS state FROM pragma_integrity_check", ())[0]["state"] == "ok"
        other.enter("serving", "by another connection")
    assert len(journal.states()) == 52


def test_the_files_are_private(tmp_path: Path, journal: Journal) -> None:
    journal.enter("serving", "it is up")

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {JOURNAL_FILE: 0o600, f"{JOURNAL_FILE}-wal": 0o600, f"{JOURNAL_FILE}-shm": 0o600}


def test_a_failed_window_is_not_forgotten_after_many_refusals(journal: Journal) -> None:
    operations = Operations(journal, "base")
    operations.record(EventKind.WINDOW_ENDED, outcome=WindowOutcome.FAILED, reason="no disk")
    with journal.transaction() as db:
        content = '{"outcome": "refused", "reason": "too soon"}'
        db.executemany("INSERT INTO events (at, kind, content) VALUES (?, 'window_ended', ?)", [(1.0, content)] * 1100)

    last = operations.last_window()

    assert last is not None
    assert last.reason == "no disk"
