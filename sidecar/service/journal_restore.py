"""Restores journal files deleted while in use, during windows too."""

import time

from sidecar.format import Say
from sidecar.record.journal import Journal
from sidecar.service.mailbox import Mailbox

_EVERY_S = 0.5
_PATIENCE_S = 1.0


class JournalRestore:
    """Used on the loop's thread, whose connection still has the deleted files open."""

    def __init__(self, journal: Journal, requests: Mailbox, say: Say) -> None:
        self._journal = journal
        self._requests = requests
        self._say = say
        self._next_at = 0.0
        requests.deleted_journal_files = journal.missing

    def look(self) -> None:
        """Restores the files if any is gone. Raises JournalError."""
        if time.monotonic() < self._next_at or self._journal.in_transaction:
            return
        self._next_at = time.monotonic() + _EVERY_S
        if not (gone := self._journal.missing()):
            return
        others = self._requests.journal_connections
        if not others.acquire(timeout=_PATIENCE_S):
            return  # a slow request has the journal open: the next call tries again
        try:
            self._say(f"{', '.join(gone)} was deleted while in use: the journal is restored")
            self._journal.restore_files()
        finally:
            others.release()
