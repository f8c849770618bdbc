"""The journal's SQLite file: opening, migration, locking, deferred writes, recovery of deleted files.

Nothing here blocks for long: a write that fails, because another process holds the lock or the disk is full, can be
deferred; deferred writes are retried in order once the file is writable again.
"""

import sqlite3
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from sidecar.record import migrations
from sidecar.record.row_validation import JournalError, check_value

_T = TypeVar("_T")

JOURNAL_FILE = "journal.sqlite"

_PATIENCE_S = 5.0
# After a write has failed on a lock, later ones wait only this long until one succeeds.
_IMPATIENCE_S = 0.05
_BUSY_TIMEOUT_MS = 50
_MAX_DEFERRED = 10_000
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class Superseded(RuntimeError):  # noqa: N818 - it names what happened
    """Another sidecar has taken over the state folder; this one must stop acting on it."""


class JournalLocked(JournalError):  # noqa: N818 - it names what happened
    """Another process holds the journal's lock."""


class JournalFile:
    """One thread's connection to a journal. ``patience_s``: how long to wait for a lock."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self._path = folder / JOURNAL_FILE
        self._read_only = read_only
        self._epoch = 0
        self._failed = False
        self._locked = False
        self._deferred: deque[tuple[str, tuple[Any, ...]]] = deque(maxlen=_MAX_DEFERRED)
        self.patience_s = _PATIENCE_S
        self.give_up: Callable[[], bool] = bool  # ends a wait for a lock early
        if read_only and not self._path.is_file():
            raise JournalError(f"{folder}: no {JOURNAL_FILE} in it; `sloguard serve` and `sloguard tune` make one")
        if not read_only:
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise JournalError(f"{self._path}: {error}") from None
        self._connect()

    def _connect(self) -> None:
        mode = "ro" if self._read_only else "rwc"
        try:
            if not self._read_only:
                _make_private(self._path)
            self._db = sqlite3.connect(f"{self._path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._patiently(self._open)
        except (sqlite3.Error, OSError) as error:
            raise _journal_error(f"{self._path}: {error}", error) from None
        self._inodes = self._present()

    def _open(self) -> None:
        self._db.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > migrations.VERSION:
            raise JournalError(f"journal of version {version}; this sloguard knows version {migrations.VERSION}")
        if self._read_only and version == 0:
            raise JournalError("the journal is still being created")
        if self._read_only:
            return
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        for number, script in enumerate(migrations.MIGRATIONS[version:], version + 1):
            self._db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")

    def version(self) -> int:
        """The file's schema version; an older one, opened read-only, lacks the newer tables."""
        return int(self.read("PRAGMA user_version", ())[0][0])

    def close(self) -> None:
        """Closes the connection."""
        self._db.close()

    # One controller

    def act_for(self, epoch: int) -> None:
        """Writes as the controller of ``epoch`` from now on."""
        self._epoch = epoch

    def epoch(self) -> int:
        """The epoch of the controller in charge; 0 before the first."""
        if self.version() < migrations.OPERATIONS:
            return 0
        return int(self.read("SELECT coalesce(max(epoch), 0) AS epoch FROM epochs", ())[0][0])

    def still_mine(self) -> None:
        """Raises Superseded if another sidecar has taken over, JournalError if that can't be read."""
        if self._epoch and (newest := self.epoch()) != self._epoch:
            raise Superseded(f"another sidecar has taken over (epoch {newest}, this one has {self._epoch})")

    # Reads and writes

    def read(self, query: str, values: tuple[Any, ...]) -> list[sqlite3.Row]:
        """The rows of a query. Raises JournalError."""
        try:
            rows = self._patiently(lambda: self._db.execute(query, values).fetchall())
        except sqlite3.Error as error:
            raise _journal_error(f"the journal can't be read: {error}", error) from None
        for row in rows:
            check_value(row)
        return rows

    def write(self, statement: str, values: tuple[Any, ...]) -> None:
        """Writes now. Raises JournalError, or Superseded if another sidecar has taken over."""
        with self.transaction() as db:
            db.execute(statement, values)

    def write_or_defer(self, statement: str, values: tuple[Any, ...]) -> JournalError | None:
        """Writes now; a failed write is retried by the next ``flush`` and its error returned. Raises Superseded.

        Queues behind writes already deferred, so that rows keep their order.
        """
        try:
            if self._deferred:
                self.flush()
            self.write(statement, values)
        except JournalError as error:
            self._deferred.append((statement, values))
            return error
        return None

    def flush(self) -> None:
        """Retries the deferred writes. Raises JournalError, Superseded."""
        if self._deferred:
            with self.transaction() as db:
                for statement, values in self._deferred:
                    db.execute(statement, values)
            self._deferred.clear()

    @contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """An atomic transaction. Raises JournalError, Superseded."""
        try:
            self._patiently(lambda: self._db.execute("BEGIN IMMEDIATE"))
            self.still_mine()
            yield self._db
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._failed = True
            raise _journal_error(f"the journal can't be written: {error}", error) from None
        except JournalError:
            self._failed = True
            raise
        finally:
            if self._db.in_transaction:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open on this connection."""
        return self._db.in_transaction

    def caught_up(self) -> bool:
        """Whether no write is deferred and none has failed since the last call."""
        failed, self._failed = self._failed, False
        return not failed and not self._deferred

    def _patiently(self, action: Callable[[], _T]) -> _T:
        """Retries while another process holds the lock, for up to ``patience_s``."""
        deadline = time.monotonic() + (_IMPATIENCE_S if self._locked else self.patience_s)
        while True:
            try:
                result = action()
            except sqlite3.Error as error:
                locked = (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _LOCKED
                if not locked or time.monotonic() >= deadline or self.give_up():
                    self._locked = self._locked or locked
                    raise
            else:
                self._locked = False
                return result

    # Deleted files

    def _present(self) -> dict[str, int]:
        """The inodes of the journal's files that exist."""
        found: dict[str, int] = {}
        for name in (JOURNAL_FILE, f"{JOURNAL_FILE}-wal", f"{JOURNAL_FILE}-shm"):
            with suppress(OSError):
                found[name] = self._path.with_name(name).stat().st_ino
        return found

    def missing(self) -> list[str]:
        """The journal files deleted or replaced while this connection has them open."""
        now = self._present()
        gone = [name for name, inode in self._inodes.items() if now.get(name) != inode]
        if not gone:
            self._inodes = now  # the write-ahead log is created with the first write
        return gone

    def restore_files(self) -> None:
        """Restores deleted files from the descriptors this connection still has open. Raises JournalError.

        This process must have no other connection: SQLite shares the log's index among them.
        """
        try:
            if self._present().get(JOURNAL_FILE) == self._inodes.get(JOURNAL_FILE):
                # The main file is still in place: move the deleted log's content into it.
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            else:
                self._copy_back()
            self._db.close()
        except (sqlite3.Error, OSError) as error:
            raise JournalError(f"the journal's files were deleted and can't be restored: {error}") from None
        for name in (f"{JOURNAL_FILE}-wal", f"{JOURNAL_FILE}-shm"):
            with suppress(FileNotFoundError):
                self._path.with_name(name).unlink()
        self._connect()

    def _copy_back(self) -> None:
        new = self._path.with_name(f".{JOURNAL_FILE}.new")
        new.unlink(missing_ok=True)
        _make_private(new)
        with closing(sqlite3.connect(new)) as copy:
            self._db.backup(copy)
        new.replace(self._path)


def last_written(folder: Path) -> tuple[tuple[int, int, int], ...]:
    """Changes whenever the journal in ``folder`` is written or replaced; needs no connection."""
    found: list[tuple[int, int, int]] = []
    for name in (JOURNAL_FILE, f"{JOURNAL_FILE}-wal"):
        with suppress(FileNotFoundError):
            facts = (folder / name).stat()
            found.append((facts.st_ino, facts.st_size, facts.st_mtime_ns))
    return tuple(found)


def _make_private(path: Path) -> None:
    """Creates the file for its owner only; SQLite copies its mode to the log and index."""
    if not path.exists():
        path.touch(mode=0o600)


def _journal_error(text: str, error: Exception) -> JournalError:
    locked = (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _LOCKED
    return JournalLocked(text) if locked else JournalError(text)
