"""The journal's queue of operator actions: who gave each one, through which interface, and its outcome."""

import json
import sqlite3
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sidecar.record import migrations
from sidecar.record.events import EventKind
from sidecar.record.journal import Journal, JournalError
from sidecar.record.row_validation import object_of

# ActionQueue pending when a sidecar was killed are still carried out by one that starts within this time.
_KEPT_S = 300.0
_MAX_SHOWN = 200


class ActionKind(StrEnum):
    """The operations that can be requested."""

    RETUNE = "retune"
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    ROLLBACK = "rollback"


class Door(StrEnum):
    """The interface an action came through."""

    CLI = "cli"
    PAGE = "page"
    REMOTE = "remote"


class ActionOutcome(StrEnum):
    """The outcome of an action."""

    PENDING = "pending"
    STARTED = "started"
    DONE = "done"
    REFUSED = "refused"
    CANCELLED = "cancelled"  # by another action
    TOO_LATE = "too_late"  # the window it was to abort had already ended
    EXPIRED = "expired"  # no sidecar ran in time


@dataclass(frozen=True)
class Sender:
    """Who gave an action; ``who`` is a user name or a certificate's common name, empty if unknown."""

    door: Door
    who: str = ""


@dataclass(frozen=True)
class OperatorAction:
    """One action. Times are seconds since the epoch; ``duration_s`` is a retune's window, 0 for the configured one."""

    id: int
    at: float
    kind: ActionKind
    sender: Sender
    outcome: ActionOutcome
    result: str
    ended_at: float | None
    duration_s: float = 0.0


class ActionQueue:
    """Reads and writes the queue. Every method raises JournalError."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def accept(self, kind: ActionKind, sender: Sender, duration_s: float = 0.0) -> int:
        """Queues an action for the loop, and returns its number."""
        with self._journal.transaction() as db:
            return self._insert(db, kind, sender, ActionOutcome.PENDING, "", duration_s)

    def settle(self, kind: ActionKind, sender: Sender, outcome: ActionOutcome, result: str) -> None:
        """Records an action that was carried out or refused immediately."""
        with self._journal.transaction() as db:
            self._insert(db, kind, sender, outcome, result, 0.0)

    def pause(self, sender: Sender, reason: str) -> tuple[int, bool]:
        """Pauses and cancels pending retunes; returns how many, and whether a window had already started.

        A single transaction, like ``begin_retune``: either the pause wins or the window does.
        """
        with self._journal.transaction() as db:
            now = time.time()
            db.execute(
                "INSERT INTO events (at, kind, content) VALUES (?, ?, ?)",
                (now, EventKind.PAUSED, json.dumps({"reason": reason})),
            )
            cancelled = _cancel_retunes(db, "paused before it started")
            started = db.execute(
                "SELECT count(*) FROM orders WHERE kind = ? AND outcome = ?",
                (ActionKind.RETUNE, ActionOutcome.STARTED),
            ).fetchone()[0]
            window = db.execute(
                "SELECT kind FROM events WHERE kind IN (?, ?) ORDER BY id DESC LIMIT 1",
                (EventKind.WINDOW_OPENED, EventKind.WINDOW_ENDED),
            ).fetchone()
            started = started or (window is not None and window["kind"] == EventKind.WINDOW_OPENED)
            self._insert(db, ActionKind.PAUSE, sender, ActionOutcome.DONE, reason, 0.0)
        return cancelled, bool(started)

    def cancel_retunes(self, why: str) -> int:
        """Cancels pending retunes, and returns how many."""
        with self._journal.transaction() as db:
            return _cancel_retunes(db, why)

    def begin_retune(self) -> OperatorAction | None:
        """Marks the oldest pending retune as started, and returns it."""
        with self._journal.transaction() as db:
            row = db.execute(
                "SELECT * FROM orders WHERE kind = ? AND outcome = ? ORDER BY id LIMIT 1",
                (ActionKind.RETUNE, ActionOutcome.PENDING),
            ).fetchone()
            if row is None:
                return None
            db.execute("UPDATE orders SET outcome = ? WHERE id = ?", (ActionOutcome.STARTED, row["id"]))
        return _action(row)

    def end(self, number: int, outcome: ActionOutcome, result: str) -> None:
        """Records an action's outcome; a failed write is deferred."""
        self._journal.write_or_defer(
            "UPDATE orders SET outcome = ?, result = ?, ended_at = ? WHERE id = ?",
            (str(outcome), result, time.time(), number),
        )

    def take_over(self) -> None:
        """Ends actions that an earlier sidecar had started, and pending ones that have expired."""
        with self._journal.transaction() as db:
            now = time.time()
            query = "UPDATE orders SET outcome = ?, result = ?, ended_at = ? WHERE outcome = ?"
            why = "the sidecar ended before it was done"
            db.execute(query, (ActionOutcome.EXPIRED, why, now, ActionOutcome.STARTED))
            db.execute(
                f"{query} AND (kind != ? OR at NOT BETWEEN ? AND ?)",
                (
                    ActionOutcome.EXPIRED,
                    why,
                    now,
                    ActionOutcome.PENDING,
                    ActionKind.RETUNE,
                    now - _KEPT_S,
                    now + _KEPT_S,
                ),
            )

    def waiting(self) -> bool:
        """Whether a retune is pending."""
        rows = self._journal.read(
            "SELECT id FROM orders WHERE kind = ? AND outcome = ? LIMIT 1", (ActionKind.RETUNE, ActionOutcome.PENDING)
        )
        return bool(rows)

    def recent(self) -> list[OperatorAction]:
        """The newest actions, oldest first."""
        if self._journal.version() < migrations.ACTIONS:
            return []
        rows = self._journal.read("SELECT * FROM orders ORDER BY id DESC LIMIT ?", (_MAX_SHOWN,))
        return [_action(row) for row in reversed(rows)]

    def _insert(  # noqa: PLR0917 - the row
        self,
        db: sqlite3.Connection,
        kind: ActionKind,
        sender: Sender,
        outcome: ActionOutcome,
        result: str,
        for_s: float,
    ) -> int:
        now = time.time()
        ended_at = None if outcome is ActionOutcome.PENDING else now
        content = json.dumps({"duration_s": for_s, "who": sender.who})
        cursor = db.execute(
            "INSERT INTO orders (at, kind, door, content, outcome, result, ended_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (now, str(kind), str(sender.door), content, str(outcome), result, ended_at),
        )
        return int(cursor.lastrowid or 0)


def _cancel_retunes(db: sqlite3.Connection, why: str) -> int:
    return db.execute(
        "UPDATE orders SET outcome = ?, result = ?, ended_at = ? WHERE kind = ? AND outcome = ?",
        (ActionOutcome.CANCELLED, why, time.time(), ActionKind.RETUNE, ActionOutcome.PENDING),
    ).rowcount


def _action(row: sqlite3.Row) -> OperatorAction:
    content: dict[str, Any] = object_of(row["content"], "action")
    try:
        sender = Sender(Door(row["door"]), str(content.get("who", "")))
        kind, outcome = ActionKind(row["kind"]), ActionOutcome(row["outcome"])
        duration_s = float(content.get("duration_s", 0.0))
    except (ValueError, TypeError) as error:
        raise JournalError(f"the journal is damaged: action {row['id']}: {error}") from None
    return OperatorAction(row["id"], row["at"], kind, sender, outcome, row["result"], row["ended_at"], duration_s)
