"""Has a thread that sleeps most of the time run as soon as it wakes, on a machine whose every core is busy.

Linux's fair scheduler may let a thread wait for a tenth of a second after it wakes up, if as many threads as there are
cores never sleep: those of vLLM on a small machine. Users' requests do not wait for the engine's threads either.
"""

import ctypes
import os
import platform
import struct
from collections.abc import Generator
from contextlib import contextmanager, suppress

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
# struct sched_attr, of which a thread of the fair class has size, nice value and, since Linux 6.12, slice.
_ATTRIBUTES = struct.Struct("=IIQiIQQQII")
_SHORTEST_SLICE_NS = 100_000
_LOWEST_PRIORITY = 1


@contextmanager
def prompt_wakeups() -> Generator[None]:
    """Real-time scheduling for this thread where it is permitted, else a short slice; threads that it starts are not.

    Where the kernel knows neither, nothing changes.
    """
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(_LOWEST_PRIORITY))
    except OSError:
        _set_slice(_SHORTEST_SLICE_NS)
        try:
            yield
        finally:
            _set_slice(0)
        return
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, policy, parameter)


def _set_slice(nanoseconds: int) -> None:
    """Sets the slice; 0 is the system's own. A kernel that has none takes it and changes nothing."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0, 0, 0)
    ctypes.CDLL(None).syscall(number, 0, attributes, 0)
