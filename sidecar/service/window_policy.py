"""Whether a window may open. Pure.

It may not while the operator has paused; unless it is forced, it may not either

1. for ``window.after_failure`` after a window that has failed: one that an error ended, or whose winner did not start
   or was taken back by itself. One that was aborted, stopped, refused or out of time has not failed;
2. above ``window.max_rate`` requests/s over the last five minutes, or where that is not known.
"""

from sidecar.config.window import WindowConfig
from sidecar.format import when
from sidecar.record.events import Event, WindowOutcome


def window_refusal(  # noqa: PLR0917 - all that the rule looks at
    window: WindowConfig, now: float, paused: Event | None, last: Event | None, rate: float | None, force: bool
) -> str:
    """Why no window may open at ``now``, seconds since the epoch, in one sentence; empty when one may."""
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
        return "the traffic was not watched for a minute yet, and window.max_rate is set"
    return f"{rate:.3g} requests/s are more than window.max_rate {most:g}" if rate > most else ""
