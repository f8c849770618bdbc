"""Reads small files of others: a pipe, a device or a file without an end must neither block nor fill the memory."""

import errno
import os
import stat
from pathlib import Path

# Real ones have up to 1 MiB, with the names of many classes.
MAX_MODEL_FILE_BYTES = 4 * 2**20


def read_small_file(path: Path, most_bytes: int = MAX_MODEL_FILE_BYTES) -> bytes:
    """The content of a regular file. Raises OSError if it is something else, or larger than ``most_bytes``."""
    # A pipe without a writer would block the open.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {most_bytes // 2**20} MiB", str(path))
    return content
