"""A wall clock that can be made to jump, for one process and what it starts."""

import functools
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

COMPILER = shutil.which("cc")
_SOURCE = Path(__file__).with_name("jumping_clock.c")


@functools.cache
def library() -> Path:
    """Compiled once. Raises CalledProcessError."""
    path = Path(tempfile.gettempdir()) / f"sloguard-jumping-clock-{_SOURCE.stat().st_mtime_ns}.so"
    if not path.exists():
        assert COMPILER is not None
        new = path.with_suffix(".new")
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", str(new), str(_SOURCE)], check=True)
        new.replace(path)
    return path


def set_seconds(clock: Path, seconds: int) -> None:
    """Moves the clock of those who run with ``environment(clock)`` to so many seconds off the real one."""
    with clock.open("r+b" if clock.exists() else "w+b", buffering=0) as file:
        file.write(struct.pack("q", seconds))


def environment(clock: Path) -> dict[str, str]:
    """What makes a process live by ``clock``."""
    return {"LD_PRELOAD": str(library()), "JUMPING_CLOCK": str(clock)}
