"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text``; whoever reads it meanwhile sees the old or the new one. Raises OSError."""
    new = path.with_suffix(".new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:  # who asked knows nothing of the new one
        raise OSError(error.errno, error.strerror, str(path)) from None
