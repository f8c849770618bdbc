"""How long the service will be down for an operator's order, in words, from what was measured. Pure."""

from sidecar.format import when
from sidecar.preflight.window_forecast import Durations, Known


def retune_downtime(takes: Durations, now: float, window_s: float) -> str:
    """For a window that opens at ``now``, in seconds since the epoch."""
    return (
        f"vLLM will be down for up to {_duration(window_s)}, until {when(now + window_s)} at the latest: it drains"
        f" ({_known(takes.drain)}), is tuned, and starts again ({_known(takes.start)})"
    )


def rollback_downtime(takes: Durations) -> str:
    """For the return to the previous configuration."""
    total = takes.drain.seconds + takes.start.seconds
    return (
        f"vLLM will be down for about {_duration(total)}: it drains ({_known(takes.drain)}) and starts with the"
        f" previous configuration ({_known(takes.start)})"
    )


def abort_downtime(takes: Durations) -> str:
    """For the end of an open window: vLLM is away already."""
    return f"vLLM will serve again in about {_duration(takes.start.seconds)} ({takes.start.source})"


def _known(known: Known) -> str:
    return f"{_duration(known.seconds)}, {known.source}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
