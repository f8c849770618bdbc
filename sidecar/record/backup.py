"""Backs up the journal consistently while the sidecar runs.

Copying the main file alone would lose whatever is still in the write-ahead log.
"""

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from sidecar.record.journal import JOURNAL_FILE
from sidecar.record.row_validation import JournalError


def back_up(folder: Path, target: Path) -> int:
    """Writes a copy of the journal in ``folder`` to ``target``, and returns its size in bytes.

    The copy is created atomically, readable by its owner only. Raises JournalError, OSError.
    """
    source = folder / JOURNAL_FILE
    if not source.is_file():
        raise JournalError(f"{folder}: there is no {JOURNAL_FILE} to back up")
    if target.is_dir():
        raise JournalError(f"{target}: is a folder; name the file to write")
    new = target.with_name(f".{target.name}.new")
    new.unlink(missing_ok=True)
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        uri = f"{source.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as journal, closing(sqlite3.connect(new)) as copy:
            journal.backup(copy)
            # A single self-contained file.
            copy.execute("PRAGMA journal_mode = DELETE")
            problem = str(copy.execute("PRAGMA quick_check").fetchone()[0])
        if problem != "ok":
            raise JournalError(f"{source}: is damaged: {problem}")
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(target)
    except sqlite3.Error as error:
        raise JournalError(f"{source}: {error}") from None
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)
    return target.stat().st_size
