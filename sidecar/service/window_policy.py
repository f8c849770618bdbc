"""Decides whether a window may open. Pure.

A pause refuses every window. Unless forced, a window is also refused

1. for ``window.after_failure`` after a failed window: one that ended in an error, or whose winner did not start or was
   rolled back automatically. Aborted, stopped, refused and out-of-time windows do not count as failed;
2. above ``window.max_rate`` requests/s over the last five minutes, or if the rate is not known.
"""

from sidecar.config.window import WindowConfig
from sidecar.format import when
from sidecar.record.events import Event, WindowOutcome


def window_refusal(  # noqa: PLR0917 - all inputs of the rule
    window: WindowConfig, now: float, paused: Event | None, last: Event | None, rate: float | None, force: bool
) -> str:
    """Why no window may open at ``now`` (seconds since the epoch); empty if one may."""
    if paused is not None:
        return f"paused since {when(paused.at)}{f' ({paused.reason})' if paused.reason else ''}: `sloguard resume`"
    if force:
        return ""
    if last is not None and last.content["outcome"] == WindowOutcome.FAILED:
        until = last.at + window.after_failure
        if now < until:
            return f"the window that ended {when(last.at)} failed ({last.reason}): none before {when(until)}"
    return "" if window.max_rate is None else _too_much(rate, window.max_rate)


def _too_much(rate: float | None, most: float) -> str:
    if rate is None:
        return "window.max_rate is set, and there is less than a minute of traffic data yet"
    return f"{rate:.3g} requests/s are more than window.max_rate {most:g}" if rate > most else ""
