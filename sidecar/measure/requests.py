"""A load as values: its requests, its progress, how it ended."""

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
    """A partial result at ``now_s``, on the clock of the starts; ``planned`` requests are sent in all."""

    now_s: float
    planned: int
    finished: tuple[RequestResult, ...]
    in_flight: tuple[InFlight, ...]


@dataclass(frozen=True)
class LoadResult:
    """Every request of one load, failed ones included, and how long it took from the first to the last.

    ``ending`` is None where all that were ``planned`` were sent. Those that were cancelled are not among ``requests``.
    """

    requests: tuple[RequestResult, ...]
    duration_s: float
    planned: int = 0
    cancelled: int = 0
    warm_up: WarmUp = field(default_factory=WarmUp)
    ending: "Ending | None" = None


@dataclass(frozen=True)
class Ending:
    """That a load is to end, and why."""

    how: End
    why: str


# Decides whether a load that is running ends now.
StopRule = Callable[[LoadProgress], Ending | None]


def to_the_end(_: LoadProgress) -> Ending | None:
    """Never ends a load early."""
    return None
