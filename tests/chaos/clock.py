"""A wall clock that can be made to jump, for one process and its children."""

import functools
import os
import shutil
import struct
import subprocess
import tempfile
import threading
from pathlib import Path

COMPILER = shutil.which("cc")
_SOURCE = Path(__file__).with_name("jumping_clock.c")


@functools.cache
def library() -> Path:
    """The preload library, compiled once. Raises CalledProcessError."""
    path = Path(tempfile.gettempdir()) / f"sloguard-jumping-clock-{_SOURCE.stat().st_mtime_ns}.so"
    if not path.exists():
        assert COMPILER is not None
        new = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")  # runs compile it at the same time
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", str(new), str(_SOURCE)], check=True)
        new.replace(path)
    return path


def set_seconds(clock: Path, seconds: int) -> None:
    """Sets the offset from real time for processes run with ``environment(clock)``."""
    with clock.open("r+b" if clock.exists() else "w+b", buffering=0) as file:
        file.write(struct.pack("q", seconds))
    # The kernel recomputes the boot time when its clock is set.
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    moved = ([line[0], str(int(line[1]) + seconds)] if line[0] == "btime" else line for line in lines)
    boot_time(clock).write_text("".join(" ".join(line) + "\n" for line in moved))


def boot_time(clock: Path) -> Path:
    """The file to mount over /proc/stat, with the boot time according to ``clock``."""
    return clock.with_suffix(".stat")


def command(clock: Path) -> list[str]:
    """The prefix for a command that runs on ``clock``; replacing /proc/stat needs root."""
    if os.geteuid() != 0:
        return []
    return ["unshare", "-m", "sh", "-c", 'mount --bind "$0" /proc/stat && exec "$@"', str(boot_time(clock))]


def environment(clock: Path) -> dict[str, str]:
    """The environment variables that put a process on ``clock``."""
    return {"LD_PRELOAD": str(library()), "JUMPING_CLOCK": str(clock)}
