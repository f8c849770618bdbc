"""A load as values: its requests, its progress, how it ended."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass as checked

# What the client tells is checked as it is read: it comes from outside.
BoundedSeconds = Annotated[float, Field(gt=-1e9, lt=1e9)]


@checked(frozen=True)
class RequestResult:
    """One request as the client saw it: seconds; None for what it did not see; ``error`` is empty when it succeeded.

    ``start_s`` is on a clock of the client's own, None where it does not say.
    """

    ttft_s: BoundedSeconds | None
    e2e_s: BoundedSeconds | None
    itls_s: tuple[BoundedSeconds, ...]
    error: str = ""
    start_s: BoundedSeconds | None = None


@checked(frozen=True)
class InFlight:
    """A request that has not been answered in full: ``ttft_s`` is None until its first token."""

    start_s: BoundedSeconds
    ttft_s: BoundedSeconds | None


@checked(frozen=True)
class LoadProgress:
    """What a load has shown up to ``now_s``, on the clock of the starts; ``planned`` requests are sent in all."""

    now_s: BoundedSeconds
    planned: int
    finished: tuple[RequestResult, ...]
    in_flight: tuple[InFlight, ...]


@checked(frozen=True)
class WarmUp:
    """The requests before the load: whether the step times settled, or the bound was reached."""

    requests: int = 0
    seconds: BoundedSeconds = 0.0
    settled: bool = True


@checked(frozen=True)
class LoadResult:
    """Every request of one load, failed ones included, and how long it took from the first to the last.

    ``ending`` is None where all that were ``planned`` were sent. Those that were cancelled are not among ``requests``.
    """

    requests: tuple[RequestResult, ...]
    duration_s: BoundedSeconds
    planned: int = 0
    cancelled: int = 0
    warm_up: WarmUp = WarmUp()
    ending: "Ending | None" = None


class End(StrEnum):
    """How a load ends before its last request was sent."""

    ENOUGH = "enough"  # no more are sent; those in flight are waited for
    STOP = "stop"  # those in flight are cancelled


@dataclass(frozen=True)
class Ending:
    """That a load is to end, and why."""

    how: End
    why: str


# Looks at a load while it runs.
StopRule = Callable[[LoadProgress], Ending | None]


def to_the_end(_: LoadProgress) -> Ending | None:
    """Watches nothing."""
    return None
