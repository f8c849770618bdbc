"""What a load has shown while it still runs, and what that says at least of its end. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sidecar.measure.measurement import Measurement, never_if_none
from sidecar.measure.requests import Ending, LoadProgress
from vllm_sloguard.latency import nearest_rank


@dataclass(frozen=True)
class Hopeless(Ending):
    """The end of a load that misses the SLO. Of ``at_least``, the p99s and failures are lower bounds, None unknown."""

    at_least: Measurement


@dataclass(frozen=True)
class Arrival:
    """One request. Its times, seconds, are at least so long; a failed one's are infinite.

    ``begun`` is whether ``ttft_s`` is final, ``ended`` whether ``e2e_s`` is.
    """

    start_s: float
    ttft_s: float
    e2e_s: float
    itls_s: tuple[float, ...]
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


def rank(total: int) -> int:
    """The p99 of ``total`` values is the so-manieth largest of them."""
    return total - nearest_rank(total, 0.99) + 1


def least_p99_ms(known_s: Sequence[float], total: int) -> float | None:
    """The lowest p99 that ``total`` values can have, of which those known are at least so large; None for any."""
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

    Of means and goodput nothing is said: the quick ones end first.
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
