"""Load data types: requests, progress, ending."""

from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_sloguard.starts.load_protocol import End, InFlight, RequestResult, WarmUp

__all__ = [
    "End",
    "Ending",
    "InFlight",
    "LoadProgress",
    "LoadResult",
    "RequestResult",
    "StopRule",
    "WarmUp",
    "to_the_end",
]


@dataclass(frozen=True)
class LoadProgress:
    """A partial result at ``now_s``, on the same clock as the requests' starts, of ``planned`` requests."""

    now_s: float
    planned: int
    finished: tuple[RequestResult, ...]
    in_flight: tuple[InFlight, ...]


@dataclass(frozen=True)
class LoadResult:
    """Every request of one load, including failed ones, and the time from the first to the last.

    ``ending`` is None if all ``planned`` were sent. ``requests`` leaves out the cancelled ones.
    """

    requests: tuple[RequestResult, ...]
    duration_s: float
    planned: int = 0
    cancelled: int = 0
    warm_up: WarmUp = field(default_factory=WarmUp)
    ending: "Ending | None" = None


@dataclass(frozen=True)
class Ending:
    """How and why a load is to end."""

    how: End
    why: str


# Decides whether a running load ends now.
StopRule = Callable[[LoadProgress], Ending | None]


def to_the_end(_: LoadProgress) -> Ending | None:
    """Never ends a load early."""
    return None
