"""Bounds the disk space of engines' logs while they are written.

An engine that logs without end must not fill the disk of the journal. The middle of a large log is released: its
beginning says how the engine was started, its end why it ended. Writers are not disturbed, and offsets stay the same.
"""

import ctypes
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_sloguard.agent.process_identity import output_of

MAX_LOG_BYTES = 24 * 2**20
MAX_TOTAL_BYTES = 256 * 2**20
_MAX_LOGS = 100
_HEAD_BYTES = 2**20
# At least what is searched for the cause of a crash.
_TAIL_BYTES = 8 * 2**20
_EVERY_S = 1.0
_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # linux/falloc.h
_BLOCK = 4096


@contextmanager
def bounded_logs(folder: Path) -> Generator[None]:
    """Bounds the logs in ``folder``, on a thread of its own."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_EVERY_S):
            bound_logs(folder)

    thread = threading.Thread(target=watch, name="sloguard-logs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def bound_logs(folder: Path) -> None:
    """Shortens large logs; deletes the oldest ones beyond the total, unless they are still written."""
    logs = sorted(((_facts(log), log) for log in folder.glob("*.log")), key=lambda one: one[0][0], reverse=True)
    total = 0
    for count, ((_, size, used), log) in enumerate(logs, 1):
        if used > MAX_LOG_BYTES:
            with suppress(OSError):
                _shorten(log, size)
        total += min(used, MAX_LOG_BYTES)
        if (total > MAX_TOTAL_BYTES or count > _MAX_LOGS) and not _is_written(log):
            with suppress(OSError):
                log.unlink()


def _facts(log: Path) -> tuple[float, int, int]:
    """When it was last written, its size, and the bytes that it occupies."""
    try:
        facts = log.stat()
    except OSError:
        return 0.0, 0, 0
    return facts.st_mtime, facts.st_size, facts.st_blocks * 512


def _shorten(log: Path, size: int) -> None:
    """Releases the middle. Raises OSError."""
    begin, end = _HEAD_BYTES, (size - _TAIL_BYTES) // _BLOCK * _BLOCK
    descriptor = os.open(log, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if _release(descriptor, begin, end - begin):
            return
        # The file system has no holes: the end is kept, with all that is written until just before the file is cut.
        os.lseek(descriptor, max(size - _TAIL_BYTES, 0), os.SEEK_SET)
        tail = b""
        while more := os.read(descriptor, _TAIL_BYTES):
            tail = (tail + more)[-_TAIL_BYTES:]
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)
    with log.open("ab") as file:
        file.write(tail)


def _release(descriptor: int, at: int, count: int) -> bool:
    """Releases ``count`` bytes; False if the file system can't."""
    fallocate = getattr(ctypes.CDLL(None), "fallocate", None)
    if fallocate is None or count <= 0:
        return count <= 0
    mode = ctypes.c_int(_PUNCH_HOLE | _KEEP_SIZE)
    return fallocate(ctypes.c_int(descriptor), mode, ctypes.c_int64(at), ctypes.c_int64(count)) == 0


def _is_written(log: Path) -> bool:
    """Whether a process has it as its output."""
    own = log.resolve()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and output_of(int(entry.name)) == own:
                return True
    return False
