"""A load that is still running: its requests so far, and lower bounds on what it will end with. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from sidecar.measure.measurement import Measurement, never_if_none
from sidecar.measure.requests import Ending, LoadProgress
from vllm_sloguard.latency import nearest_rank


class StopReason(StrEnum):
    """Why a load was stopped before its last request."""

    MISSED = "SLO missed"  # whatever the remaining requests do, or at the promised confidence
    SATURATED = "over-saturated"
    OUTPERFORMED = "outperformed"  # another configuration is better


@dataclass(frozen=True)
class LimitEstimate:
    """One limit of the SLO: ``log_excess`` is log(final / limit), below 0 is met; ``sd`` is its standard deviation.

    ``over`` is the share of the requests (of the gaps, for ITL) seen so far that exceeded the limit.
    """

    name: str
    log_excess: float
    sd: float
    over: float = 0.0

    @property
    def margin(self) -> float:
        """(final - limit) / limit."""
        return math.expm1(self.log_excess)


@dataclass(frozen=True)
class LoadEstimate:
    """What a load of ``planned`` requests would have shown at its end, as estimated when it was stopped.

    ``sent`` requests had been sent after ``elapsed_s``, and ``waiting`` of them had no first token yet.
    ``queue_growth`` is the trend of the TTFT: seconds for each second of arrivals, 0 where it is not significant.
    ``mean_sd`` is the standard deviation of the logarithm of ``mean_ms``.
    """

    planned: int
    sent: int
    elapsed_s: float
    waiting: int
    queue_growth: float
    limits: tuple[LimitEstimate, ...] = field(default=())
    mean_ms: float | None = None
    mean_sd: float = 0.0

    @property
    def violation(self) -> float:
        """As sidecar.measure.verdict.violation, of the estimates."""
        excesses = [min(max(limit.margin, 0.0), 10.0) for limit in self.limits]
        return sum(excesses) / len(excesses) if excesses else 0.0

    @property
    def worst(self) -> LimitEstimate | None:
        """The limit that is missed by most, or met by least."""
        return max(self.limits, key=lambda limit: limit.log_excess, default=None)


@dataclass(frozen=True)
class EarlyStop(Ending):
    """The end of a load that the search has no further use for.

    In ``bounds`` the p99s and failures are lower bounds, None if unknown; ``estimate`` is the expected result.
    """

    bounds: Measurement
    reason: StopReason = StopReason.MISSED
    estimate: LoadEstimate | None = None


_NO_GAPS: NDArray[np.float64] = np.empty(0)


@dataclass(frozen=True)
class Arrival:
    """One request that was sent. Its times, seconds, are lower bounds while it runs; a failed request's are infinite.

    ``begun`` says that ``ttft_s`` is final, ``ended`` that ``e2e_s`` is.
    """

    start_s: float
    ttft_s: float
    e2e_s: float
    itls_s: NDArray[np.float64] | tuple[float, ...]
    begun: bool
    ended: bool
    failed: bool


def arrivals(progress: LoadProgress) -> list[Arrival]:
    """The requests that were sent, in that order."""
    found = [
        Arrival(r.start_s or 0.0, never_if_none(r.ttft_s), never_if_none(r.e2e_s), r.itls_s, True, True, bool(r.error))
        for r in progress.finished
    ]
    for r in progress.in_flight:
        age_s = progress.now_s - r.start_s
        begun = r.ttft_s is not None
        found.append(Arrival(r.start_s, age_s if r.ttft_s is None else r.ttft_s, age_s, (), begun, False, False))
    return sorted(found, key=lambda arrival: arrival.start_s)


def gaps_of(requests: Sequence[Arrival]) -> NDArray[np.float64]:
    """All gaps between tokens of the requests that ended well, seconds; those of a failed one are not judged."""
    return np.concatenate(
        [_NO_GAPS, *(np.asarray(a.itls_s, dtype=np.float64) for a in requests if a.ended and not a.failed)]
    )


def rank(total: int) -> int:
    """The p99 of ``total`` values has this rank, counted from the largest."""
    return total - nearest_rank(total, 0.99) + 1


def least_p99_ms(known_s: Sequence[float] | NDArray[np.float64], total: int) -> float | None:
    """The lowest p99 that ``total`` values can have if the known ones are at least this large; None for any."""
    if not total or len(known_s) < rank(total):
        return None
    return float(np.partition(np.asarray(known_s), -rank(total))[-rank(total)]) * 1000


def lower_bounds(
    sent: Sequence[Arrival],
    now_s: float,
    requests: int,
    p99s_ms: Mapping[str, float | None],
    failed: int = 0,
) -> Measurement:
    """A measurement of lower bounds, over ``requests``; ``p99s_ms`` by the names of the limits.

    Means and goodput are left out: the fast requests end first.
    """
    return Measurement(
        requests=requests,
        failed=failed,
        duration_s=now_s - sent[0].start_s if sent else 0.0,
        ttft_p99_ms=p99s_ms.get("ttft_p99_ms"),
        itl_p99_ms=p99s_ms.get("itl_p99_ms"),
        e2e_p99_ms=p99s_ms.get("e2e_p99_ms"),
        ttft_mean_ms=None,
        e2e_mean_ms=None,
        goodput_rps=0.0,
    )
