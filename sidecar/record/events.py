"""The event log: pauses, windows, starts, crashes, hooks, probations; and the promotions with their rollbacks.

Events are stored in the journal; the present state (paused, window open, …) is derived from them.
"""

import dataclasses
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sidecar.record import migrations
from sidecar.record.decisions import Outcome, outcome_of
from sidecar.record.journal import Journal, Promoted
from sidecar.record.row_validation import JournalError, is_number, object_of
from sidecar.record.wording import OUTCOMES

# A restore is expected to take as long as the longest of the last ordinary starts.
_STARTS = 10
_MAX_SHOWN = 1000
_MAX_HANDLED = 200


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_window_outcome(value: object) -> bool:
    return value in list(WindowOutcome)


def _is_promotion(value: object) -> bool:
    return value is None or is_number(value)


class EventKind(StrEnum):
    """What happened."""

    PAUSED = "paused"  # reason
    RESUMED = "resumed"
    WINDOW_OPENED = "window_opened"  # reason, record (of the requests before it), due (if scheduled)
    # outcome, reason, decision (of its run, if the run was completed); if it did not open, when it was due
    WINDOW_ENDED = "window_ended"
    START = "start"  # base, promotion, seconds
    CRASH = "crash"  # promotion, reason
    PROBATION = "probation"  # promotion, reason: passed
    HOOK_BEFORE = "hook_before"  # before_drain ran, so after_restore is due
    HOOK_AFTER = "hook_after"


# The fields read from each kind, with their validation.
_READ: dict[EventKind, dict[str, Callable[[object], bool]]] = {
    EventKind.WINDOW_ENDED: {"outcome": _is_window_outcome},
    EventKind.START: {"base": _is_text, "promotion": _is_promotion, "seconds": is_number},
    EventKind.CRASH: {"promotion": _is_promotion},
    EventKind.PROBATION: {"promotion": _is_promotion},
}


class WindowOutcome(StrEnum):
    """How a window ended. Only a failed one delays the next."""

    PROMOTED = "promoted"
    KEPT = "kept"
    REFUSED = "refused"  # nothing was drained
    MISSED = "missed"  # due, but could not be opened in time
    ABORTED = "aborted"
    STOPPED = "stopped"  # the sidecar was stopped or killed
    OUT_OF_TIME = "out_of_time"
    INTERRUPTED = "interrupted"  # the journal could not be written
    FAILED = "failed"


@dataclass(frozen=True)
class Event:
    """One event; ``at`` is in seconds since the epoch."""

    at: float
    kind: EventKind
    content: dict[str, Any]

    @property
    def reason(self) -> str:
        """The recorded reason."""
        return str(self.content.get("reason", ""))

    @property
    def outcome(self) -> str:
        """How a window ended, in words."""
        return window_ending(WindowOutcome(self.content["outcome"]), self.decision)

    @property
    def decision(self) -> Outcome | None:
        """The decision of a window's run, if the run was completed."""
        with suppress(ValueError):
            return outcome_of(str(self.content.get("decision")))
        return None


def window_ending(outcome: WindowOutcome, decision: Outcome | None) -> str:
    """How a window ended, in words; for a kept incumbent the run's ``decision`` is more specific."""
    return OUTCOMES[decision] if outcome is WindowOutcome.KEPT and decision else outcome.replace("_", " ")


class Operations:
    """Reads and writes a journal's events and promotions. Every method raises JournalError."""

    def __init__(self, journal: Journal, base_digest: str) -> None:
        self._journal = journal
        self._base = base_digest

    def record(self, kind: EventKind, **content: object) -> None:
        """Writes an event."""
        self._journal.write(
            "INSERT INTO events (at, kind, content) VALUES (?, ?, ?)", (time.time(), str(kind), json.dumps(content))
        )

    def record_or_defer(self, kind: EventKind, **content: object) -> JournalError | None:
        """Writes an event; a failed write is deferred, keeping its time, and its error returned."""
        return self._journal.write_or_defer(
            "INSERT INTO events (at, kind, content) VALUES (?, ?, ?)", (time.time(), str(kind), json.dumps(content))
        )

    def record_opened(self, due: float | None, **content: object) -> bool:
        """Writes that a window has opened; False if it was scheduled (``due``) and a pause came first."""
        with self._journal.transaction() as db:
            last = db.execute(
                "SELECT kind FROM events WHERE kind IN (?, ?) ORDER BY id DESC LIMIT 1",
                (EventKind.PAUSED, EventKind.RESUMED),
            ).fetchone()
            if due is not None and last is not None and last["kind"] == EventKind.PAUSED:
                return False
            db.execute(
                "INSERT INTO events (at, kind, content) VALUES (?, ?, ?)",
                (time.time(), str(EventKind.WINDOW_OPENED), json.dumps({**content, "due": due})),
            )
            return True

    def events(self, kinds: Sequence[EventKind], most: int = _MAX_SHOWN, since: float = 0.0) -> list[Event]:
        """The newest events of ``kinds``, oldest first."""
        if self._journal.version() < migrations.OPERATIONS:
            return []
        marks = ", ".join("?" for _ in kinds)
        query = f"SELECT * FROM events WHERE kind IN ({marks}) AND at >= ? ORDER BY id DESC LIMIT ?"  # noqa: S608
        rows = self._journal.read(query, (*map(str, kinds), since, most))
        return [_event(row) for row in reversed(rows)]

    def _last(self, *kinds: EventKind) -> Event | None:
        return next(iter(self.events(kinds, 1)), None)

    # Windows

    def paused(self) -> Event | None:
        """The pause in force: its start, with the latest reason."""
        first: Event | None = None
        for event in reversed(self.events([EventKind.PAUSED, EventKind.RESUMED])):
            if event.kind is EventKind.RESUMED:
                break
            first = event if first is None else dataclasses.replace(first, at=event.at)
        return first

    def open_window(self) -> Event | None:
        """The window now open."""
        last = self._last(EventKind.WINDOW_OPENED, EventKind.WINDOW_ENDED)
        return last if last is not None and last.kind is EventKind.WINDOW_OPENED else None

    def handled_windows(self) -> list[tuple[float, float]]:
        """When the newest scheduled windows that have a record were due: from and to, seconds since the epoch."""
        found: list[tuple[float, float]] = []
        for event in self.events([EventKind.WINDOW_OPENED, EventKind.WINDOW_ENDED], _MAX_HANDLED):
            first, last = (event.content.get(name, event.content.get("due")) for name in ("first_due", "last_due"))
            if first is not None and last is not None and is_number(first) and is_number(last):
                found.append((float(first), float(last)))
        return found

    def missed_windows(self) -> tuple[float, float] | None:
        """When windows missed since the last scheduled one opened were due: from and to, seconds since the epoch."""
        for event in reversed(self.events([EventKind.WINDOW_OPENED, EventKind.WINDOW_ENDED], _MAX_HANDLED)):
            content = event.content
            if event.kind is EventKind.WINDOW_OPENED and content.get("due") is not None:
                return None
            first, last = content.get("first_due"), content.get("last_due")
            missed = content.get("outcome") == WindowOutcome.MISSED
            if missed and first is not None and last is not None and is_number(first) and is_number(last):
                return float(first), float(last)
        return None

    def last_window(self) -> Event | None:
        """The end of the last window that did open, i.e. was neither refused nor missed."""
        if self._journal.version() < migrations.OPERATIONS:
            return None
        rows = self._journal.read(
            "SELECT * FROM events WHERE kind = ? AND json_extract(content, '$.outcome') NOT IN (?, ?)"
            " ORDER BY id DESC LIMIT 1",
            (EventKind.WINDOW_ENDED, WindowOutcome.REFUSED, WindowOutcome.MISSED),
        )
        return _event(rows[0]) if rows else None

    def hook_owed(self) -> bool:
        """Whether ``after_restore`` is still due for an earlier ``before_drain``."""
        last = self._last(EventKind.HOOK_BEFORE, EventKind.HOOK_AFTER)
        return last is not None and last.kind is EventKind.HOOK_BEFORE

    def longest_start_s(self) -> float | None:
        """The longest of the last ordinary starts with the file's present arguments, in seconds."""
        starts = [e.content for e in self.events([EventKind.START]) if e.content["base"] == self._base]
        return max((float(s["seconds"]) for s in starts[-_STARTS:]), default=None)

    # Promotions

    def promotions(self) -> list[Promoted]:
        """All promotions for the file's present arguments, oldest first."""
        return [p for p in self._journal.promotions() if p.base_digest == self._base]

    def current(self) -> Promoted | None:
        """The current promotion; None if the file's own arguments are current."""
        return next((p for p in reversed(self.promotions()) if p.rolled_back_at is None), None)

    def roll_back(self, promotion: int, reason: str) -> None:
        """Rolls a promotion back for good and quarantines its arguments; a no-op if already rolled back."""
        self._journal.write(
            "INSERT OR IGNORE INTO rollbacks (promotion, at, reason) VALUES (?, ?, ?)",
            (promotion, time.time(), reason),
        )

    def quarantined(self) -> list[Promoted]:
        """Promotions whose arguments must not be promoted again."""
        return [p for p in self.promotions() if p.rolled_back_at is not None]

    def served_since(self, promotion: int) -> float | None:
        """When a promotion first came up, seconds since the epoch; None if it has not."""
        starts = self.events([EventKind.START])
        return next((e.at for e in starts if e.content["promotion"] == promotion), None)

    def probation_over(self, promotion: int) -> bool:
        """Whether its probation has ended."""
        return any(e.content["promotion"] == promotion for e in self.events([EventKind.PROBATION]))

    def record_before(self, at: float) -> dict[str, Any] | None:
        """The traffic record made by the last window opened before ``at``, as sidecar.promote.probation reads it."""
        opened = [e for e in self.events([EventKind.WINDOW_OPENED]) if e.at <= at]
        return opened[-1].content.get("record") if opened else None


def _event(row: sqlite3.Row) -> Event:
    kind, content = EventKind(row["kind"]), object_of(row["content"], "event")
    for name, holds in _READ.get(kind, {}).items():
        if name not in content or not holds(content[name]):
            raise JournalError(f"the journal is damaged: {kind}: {name}: {str(content.get(name))[:40]!r}")
    return Event(row["at"], kind, content)
