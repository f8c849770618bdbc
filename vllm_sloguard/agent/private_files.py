"""Files that a sidecar or an agent writes are for its user only; engines and hooks keep the umask of its start."""

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_PRIVATE = 0o077
_inherited: list[int] = []


@contextmanager
def private_files(folder: Path) -> Generator[None]:
    """Sets the umask, and closes the files of earlier versions in ``folder`` to others."""
    for pattern in ("*", "logs/*", "promoted/*"):
        for path in folder.glob(pattern):
            if path.is_file() and not path.is_symlink():
                with suppress(OSError):
                    path.chmod(path.stat().st_mode & ~_PRIVATE & 0o777)
    _inherited.append(os.umask(_PRIVATE))
    try:
        yield
    finally:
        os.umask(_inherited.pop())


def umask_of_children() -> int:
    """For subprocess.Popen; -1, which changes nothing, outside of ``private_files``."""
    return _inherited[-1] if _inherited else -1


def accessible_to_others(path: Path) -> bool:
    """Whether somebody else may use the secret in ``path``. Raises OSError."""
    facts = path.stat()
    # Kubernetes makes secrets readable by the pod's group.
    return facts.st_uid not in (os.geteuid(), 0) or bool(facts.st_mode & 0o037)
