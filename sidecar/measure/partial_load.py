"""A running load: its requests so far, and lower bounds on its final result. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecar.measure.measurement import Measurement, never_if_none
from sidecar.measure.requests import Ending, LoadProgress, RequestResult
from vllm_sloguard.latency import nearest_rank, tpot


class StopReason(StrEnum):
    """Why a load was stopped before its last request."""

    MISSED = "SLO missed"  # by arithmetic, or at the configured confidence
    SATURATED = "over-saturated"
    OUTPERFORMED = "outperformed"  # another configuration is better
    BETTER = "better"  # than the best one; it can still be measured to the end


@dataclass(frozen=True)
class LimitEstimate:
    """One limit of the SLO: ``log_excess`` is log(final / limit), below 0 meets it; ``sd`` is its standard deviation.

    ``over`` is the share of the requests (of the gaps, for ITL) so far that exceeded the limit, and ``sigmas`` by how
    many standard deviations that is more than the limit allows.
    """

    name: str
    log_excess: float
    sd: float
    over: float = 0.0
    sigmas: float = 0.0  # missing in journals of earlier versions

    @property
    def margin(self) -> float:
        """(final - limit) / limit."""
        return math.expm1(self.log_excess)


@dataclass(frozen=True)
class LoadEstimate:
    """The predicted final result of a load of ``planned`` requests, estimated when it was stopped.

    ``sent`` requests had been sent after ``elapsed_s``, of which ``waiting`` had no first token yet. ``queue_growth``
    is the trend of TTFT: seconds per second of arrivals, 0 if not significant. ``mean_sd`` is the standard deviation of
    log(``mean_ms``).
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
        """sidecar.measure.verdict.violation of the estimates."""
        excesses = [min(max(limit.margin, 0.0), 10.0) for limit in self.limits]
        return sum(excesses) / len(excesses) if excesses else 0.0

    @property
    def worst(self) -> LimitEstimate | None:
        """The limit that is missed by most, or met by the smallest margin."""
        return max(self.limits, key=lambda limit: limit.log_excess, default=None)


@dataclass(frozen=True)
class EarlyStop(Ending):
    """The end of a load that is of no further use to the search.

    In ``bounds`` the percentiles, failures and misses are lower bounds, None if unknown; ``estimate`` is the expected
    result.
    """

    bounds: Measurement
    reason: StopReason = StopReason.MISSED
    estimate: LoadEstimate | None = None


_NO_GAPS: NDArray[np.float64] = np.empty(0)


@dataclass(frozen=True)
class Arrival:
    """One request that was sent. Its latencies, in seconds, are lower bounds while it runs; infinite if it failed.

    ``begun``: ``ttft_s`` is final; ``ended``: ``e2e_s`` is.
    """

    start_s: float
    ttft_s: float
    e2e_s: float
    itls_s: Sequence[float]
    begun: bool
    ended: bool
    failed: bool

    @cached_property
    def gaps_s(self) -> NDArray[np.float64]:
        """The gaps as an array."""
        return np.asarray(self.itls_s, dtype=np.float64)

    @cached_property
    def tpot_s(self) -> float | None:
        """The mean gap; None if there is none."""
        return tpot(self.itls_s)


# Finished requests by identity, with their arrivals: a load is polled many times, and converting its gaps is slow.
Finished = dict[int, tuple[RequestResult, Arrival]]


def arrivals(progress: LoadProgress, known: Finished | None = None) -> list[Arrival]:
    """The requests sent so far, in order; ``known`` keeps those that finished for the next call."""
    kept = {} if known is None else known
    found: list[Arrival] = []
    for finished in progress.finished:
        entry = kept.get(id(finished))
        if entry is None:
            entry = kept[id(finished)] = (finished, _finished(finished))
        found.append(entry[1])
    for r in progress.in_flight:
        age_s = progress.now_s - r.start_s
        begun = r.ttft_s is not None
        found.append(Arrival(r.start_s, age_s if r.ttft_s is None else r.ttft_s, age_s, (), begun, False, False))
    return sorted(found, key=lambda arrival: arrival.start_s)


def _finished(result: RequestResult) -> Arrival:
    ttft_s, e2e_s = never_if_none(result.ttft_s), never_if_none(result.e2e_s)
    return Arrival(result.start_s or 0.0, ttft_s, e2e_s, result.itls_s, True, True, bool(result.error))


def gaps_of(requests: Sequence[Arrival]) -> NDArray[np.float64]:
    """All gaps between tokens of the successful requests, in seconds; those of a failed request are not judged."""
    return np.concatenate([_NO_GAPS, *(a.gaps_s for a in requests if a.ended and not a.failed)])


def rank(total: int, share: float) -> int:
    """The rank of the ``share`` percentile of ``total`` values, counted from the largest."""
    return total - nearest_rank(total, share) + 1


def least_percentile_ms(known_s: Sequence[float] | NDArray[np.float64], total: int, share: float) -> float | None:
    """A lower bound on a percentile of ``total`` values, from lower bounds on the known ones; None without one."""
    if not total or len(known_s) < (place := rank(total, share)):
        return None
    return float(np.partition(np.asarray(known_s), -place)[-place]) * 1000


def lower_bounds(  # noqa: PLR0917 - the fields of a measurement
    sent: Sequence[Arrival],
    now_s: float,
    requests: int,
    percentiles_ms: Mapping[str, float | None],
    failed: int = 0,
    missed: int | None = None,
) -> Measurement:
    """A measurement of lower bounds, over ``requests``; ``percentiles_ms`` is keyed by the names of the limits.

    ``missed`` requests failed or are over a limit for a single request. Means and the rate of goodput are left out:
    fast requests finish first, so they would be biased.
    """
    known: dict[str, Any] = {"ttft_p99_ms": None, "itl_p99_ms": None, "e2e_p99_ms": None, **percentiles_ms}
    return Measurement(
        requests=requests,
        failed=failed,
        duration_s=now_s - sent[0].start_s if sent else 0.0,
        ttft_mean_ms=None,
        e2e_mean_ms=None,
        goodput_rps=0.0,
        goodput_share=None if missed is None else 1 - missed / requests,
        **known,
    )
