"""Decides which ``window.cron`` windows are due and which were missed, by the wall clock. Pure.

The clock may jump, and the sidecar may be busy or down when a window is due. A window that can't open within
``window.latest_start`` of its time is missed; one that opens late still ends on time.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.config.window import WindowConfig

_MAX_COUNTED = 1000
_REMEMBERED = 256
# Windows missed before this are not counted when a sidecar comes back.
_LOOKS_BACK_S = 7 * 86400.0


@dataclass(frozen=True)
class DueWindow:
    """A window to open now: when it was due (seconds since the epoch), and the time left of it."""

    at: float
    duration_s: float


@dataclass(frozen=True)
class MissedWindows:
    """Missed windows, due from ``first`` to ``last`` (seconds since the epoch); the count is capped at 1,000."""

    first: float
    last: float
    count: int


class WindowSchedule:
    """Tracks the windows that are due; those up to ``after`` (seconds since the epoch) have been handled.

    ``handled`` are times, from and to, for which earlier windows have a record.
    """

    def __init__(
        self, window: WindowConfig, after: float, now: float, handled: Sequence[tuple[float, float]] = ()
    ) -> None:
        self._window = window
        self._after = min(max(after, now - _LOOKS_BACK_S), now)
        self._dealt_with: deque[float] = deque(maxlen=_REMEMBERED)
        self._handled = handled

    def due(self, now: float) -> tuple[DueWindow | None, MissedWindows | None]:
        """Windows due since the last call: the newest if it may still open, and the missed ones."""
        self._after = min(self._after, now)  # the clock may have gone back
        found = self._between(self._after, now)
        latest = now - self._window.lateness_s
        if found and len(found) == _MAX_COUNTED:
            found += [at for at in self._between(latest, now) if at > found[-1]]
        self._after = now
        found = [at for at in found if at not in self._dealt_with and not self._is_handled(at)]
        self._dealt_with.extend(found[-_REMEMBERED:])
        due = None
        if found and found[-1] >= latest:
            at = found.pop()
            due = DueWindow(at, self._window.duration - (now - at))
        missed = MissedWindows(found[0], found[-1], min(len(found), _MAX_COUNTED)) if found else None
        return due, missed

    def _is_handled(self, at: float) -> bool:
        return any(first <= at <= last for first, last in self._handled)

    def _between(self, after: float, now: float) -> list[float]:
        found: list[float] = []
        at = self._window.next_opening(after)
        while at is not None and at <= now and len(found) < _MAX_COUNTED:
            found.append(at)
            at = self._window.next_opening(at)
        return found
