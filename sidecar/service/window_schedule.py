"""Which windows of ``window.cron`` are due, and which were missed, by the wall clock at each tick. Pure.

The clock may jump, and the sidecar may be busy or not run when a window is due. One that can't open within
``window.latest_start`` of its time is missed; one that opens late ends when it would have ended.
"""

from collections import deque
from dataclasses import dataclass

from sidecar.config.window import WindowConfig

_MOST_COUNTED = 1000
_REMEMBERED = 256
# A sidecar that comes back after a longer time does not count what was due meanwhile.
_LOOKS_BACK_S = 7 * 86400.0


@dataclass(frozen=True)
class DueWindow:
    """A window that is to open now: when it was due, seconds since the epoch, and how long it may still be."""

    at: float
    duration_s: float


@dataclass(frozen=True)
class MissedWindows:
    """Windows that were due from ``first`` to ``last``, seconds since the epoch; the count ends at 1,000."""

    first: float
    last: float
    count: int


class WindowSchedule:
    """``after``: the time up to which every window was dealt with, seconds since the epoch."""

    def __init__(self, window: WindowConfig, after: float, now: float) -> None:
        self._window = window
        self._after = min(max(after, now - _LOOKS_BACK_S), now)
        self._dealt_with: deque[float] = deque(maxlen=_REMEMBERED)

    def due(self, now: float) -> tuple[DueWindow | None, MissedWindows | None]:
        """What was due since the last call: the newest window that may still open, and those that may not."""
        self._after = min(self._after, now)  # the clock may have been set back
        found = self._between(self._after, now)
        latest = now - self._window.lateness_s
        if found and len(found) == _MOST_COUNTED:
            found += [at for at in self._between(latest, now) if at > found[-1]]
        self._after = now
        found = [at for at in found if at not in self._dealt_with]
        self._dealt_with.extend(found[-_REMEMBERED:])
        due = None
        if found and found[-1] >= latest:
            at = found.pop()
            due = DueWindow(at, self._window.duration - (now - at))
        missed = MissedWindows(found[0], found[-1], min(len(found), _MOST_COUNTED)) if found else None
        return due, missed

    def _between(self, after: float, now: float) -> list[float]:
        found: list[float] = []
        at = self._window.next_opening(after)
        while at is not None and at <= now and len(found) < _MOST_COUNTED:
            found.append(at)
            at = self._window.next_opening(at)
        return found
