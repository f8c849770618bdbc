"""The state folder's lock: one sidecar at a time, and no access for other users."""

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_NAME = "lock"
# `holder` takes the lock briefly to test it.
_PATIENCE_S = 0.5


class LockedError(RuntimeError):
    """Another sidecar uses the folder, or other users can access it; the text says which."""


@contextmanager
def held(folder: Path) -> Generator[None]:
    """Holds ``folder``'s lock; the kernel releases it however this process ends. Raises LockedError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_private(folder)
    with (folder / _NAME).open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + _PATIENCE_S
        while not _taken(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise LockedError(f"{folder}: the sidecar with process id {file.read().strip()} is using it")
            time.sleep(0.02)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _check_private(folder: Path) -> None:
    # Write access to the folder is control of the sidecar and of what it serves.
    facts = folder.stat()
    if facts.st_uid != os.geteuid():
        raise LockedError(f"{folder}: belongs to user {facts.st_uid}; a folder of user {os.geteuid()} is needed")
    if facts.st_mode & 0o077:
        raise LockedError(f"{folder}: is open to others (mode {facts.st_mode & 0o777:o}); chmod 700 it")


def _taken(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(folder: Path) -> int | None:
    """The process id of the sidecar that uses ``folder``; None without one."""
    path = folder / _NAME
    if not path.is_file():
        return None
    with path.open("r", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read().strip()
            return int(text) if text.isdecimal() else None
    return None
