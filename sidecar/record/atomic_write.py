"""Writes files atomically."""

import errno
import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, text: str, mode: int = 0o666) -> None:
    """Replaces the content of ``path`` with ``text``; readers see either the old content or the new. Raises OSError.

    ``mode`` is for a new file, before the umask. Devices and pipes are written directly. Symlinks are kept; one owned
    by another user is refused.
    """
    target = _target(path)
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    new = target.with_name(f".{target.name}.new")
    try:
        new.unlink(missing_ok=True)
        with open(new, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(target)
    except OSError as error:  # name the caller's path, not the temporary file
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _target(path: Path) -> Path:
    """The file to replace. A symlink created at ``path`` after this is replaced, not followed."""
    if not path.is_symlink():
        return Path(os.path.realpath(path.parent)) / path.name
    if path.lstat().st_uid != os.geteuid():
        raise OSError(errno.EPERM, "it is a symlink owned by another user", str(path))
    return Path(os.path.realpath(path))
