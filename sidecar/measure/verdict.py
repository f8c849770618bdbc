"""From a load's requests to a verdict. Pure.

A request that failed took for ever: it counts in the percentiles, where the usual clients leave it out and so report
the latencies of the survivors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

from sidecar.config.schema import Objective, Slo
from sidecar.measure.capacity_search import Tried, capacity
from sidecar.measure.requests import LoadResult, RequestResult


@pydantic_dataclass(frozen=True, config=ConfigDict(ser_json_inf_nan="strings"))
class Measurement:
    """What one load showed. ``None`` is unmeasured, which never meets a limit; ``inf`` has failed requests in it."""

    requests: int
    failed: int
    duration_s: float
    ttft_p99_ms: float | None
    itl_p99_ms: float | None
    e2e_p99_ms: float | None
    ttft_mean_ms: float | None  # of the requests that succeeded
    e2e_mean_ms: float | None  # of the requests that succeeded
    goodput_rps: float  # requests a second that met every limit

    @property
    def error_rate(self) -> float:
        """Share of the requests that failed."""
        return self.failed / self.requests if self.requests else 1.0


def measure(load: LoadResult, slo: Slo) -> Measurement:
    """Sums up ``load``."""
    good = [request for request in load.requests if not request.error]
    met = sum(meets(request, slo) for request in good)
    return Measurement(
        requests=len(load.requests),
        failed=len(load.requests) - len(good),
        duration_s=load.duration_s,
        ttft_p99_ms=_p99_ms([or_forever(r.ttft_s) for r in load.requests]),
        itl_p99_ms=_p99_ms([itl for r in good for itl in r.itls_s]),
        e2e_p99_ms=_p99_ms([or_forever(r.e2e_s) for r in load.requests]),
        ttft_mean_ms=_mean_ms([r.ttft_s for r in good if r.ttft_s is not None]),
        e2e_mean_ms=_mean_ms([r.e2e_s for r in good if r.e2e_s is not None]),
        goodput_rps=met / load.duration_s if load.duration_s > 0 else 0.0,
    )


def meets(request: RequestResult, slo: Slo) -> bool:
    """Whether one request stayed within every limit; its inter-token latency by its mean."""
    if request.error:
        return False
    itl_s = float(np.mean(request.itls_s)) if request.itls_s else 0.0
    pairs = ((request.ttft_s, slo.ttft_p99_ms), (itl_s, slo.itl_p99_ms), (request.e2e_s, slo.e2e_p99_ms))
    return all(limit_ms is None or (value_s is not None and value_s * 1000 <= limit_ms) for value_s, limit_ms in pairs)


@dataclass(frozen=True)
class Limit:
    """One limit of the SLO against what was measured."""

    name: str
    limit: float
    measured: float | None

    @property
    def excess(self) -> float:
        """How far it was missed, relative to the limit; 0 when met, 1 when nothing was measured, at most 10."""
        if self.measured is None:
            return 1.0
        if self.measured <= self.limit:
            return 0.0
        return min((self.measured - self.limit) / self.limit, 10.0) if self.limit > 0 else 10.0


def slo_limits(measurement: Measurement, slo: Slo) -> tuple[Limit, ...]:
    """Every limit that the SLO sets."""
    pairs = (
        ("ttft_p99_ms", slo.ttft_p99_ms, measurement.ttft_p99_ms),
        ("itl_p99_ms", slo.itl_p99_ms, measurement.itl_p99_ms),
        ("e2e_p99_ms", slo.e2e_p99_ms, measurement.e2e_p99_ms),
        ("error_rate", slo.error_rate, measurement.error_rate),
    )
    return tuple(Limit(name, limit, measured) for name, limit, measured in pairs if limit is not None)


def violation(measurement: Measurement, slo: Slo) -> float:
    """The mean excess over the limits; 0 when all are met."""
    excesses = [limit.excess for limit in slo_limits(measurement, slo)]
    return sum(excesses) / len(excesses)


def least_violation(bounds: Measurement, slo: Slo) -> float:
    """The same of lower bounds, of which None says nothing: the violation is at least so large."""
    found = slo_limits(bounds, slo)
    return sum(limit.excess for limit in found if limit.measured is not None) / len(found)


def value(measurement: Measurement, objective: Objective, tried: Sequence[Tried] = ()) -> float | None:
    """The objective, higher is better: requests a second within the SLO, or minus the mean latency in milliseconds.

    For the capacity, the highest rate of ``tried`` that met the SLO; 0 where none did.
    """
    if objective is Objective.CAPACITY:
        return capacity(tried) or 0.0
    if objective is Objective.GOODPUT:
        return measurement.goodput_rps
    return None if measurement.e2e_mean_ms is None else -measurement.e2e_mean_ms


def in_its_unit(value: float | None, objective: Objective) -> float | None:
    """What ``value`` gave, as people count it: a latency is positive, and lower is better. None where it is unknown."""
    if value is None or not math.isfinite(value):
        return None
    return -value if objective is Objective.LATENCY else value


def scores(load: LoadResult, slo: Slo, objective: Objective) -> tuple[float, ...]:
    """Each request's part in the objective, lower is better: its latency in seconds, or 0 if it met the SLO, else 1.

    For the capacity, of the load at the highest rate that met the SLO: the seconds between one answer within the SLO
    and the next, whose mean is one over the rate.
    """
    if objective is Objective.CAPACITY:
        return _gaps(load, slo)
    if objective is Objective.GOODPUT:
        return tuple(0.0 if meets(request, slo) else 1.0 for request in load.requests)
    return tuple(or_forever(request.e2e_s) for request in load.requests)


def _gaps(load: LoadResult, slo: Slo) -> tuple[float, ...]:
    good = [r for r in load.requests if meets(r, slo)]
    ends = sorted(r.start_s + r.e2e_s for r in good if r.start_s is not None and r.e2e_s is not None)
    return tuple(later - earlier for earlier, later in pairwise(ends))


def or_forever(seconds: float | None) -> float:
    """A time in seconds; what never came took for ever."""
    return math.inf if seconds is None else seconds


def _p99_ms(seconds: Sequence[float]) -> float | None:
    if not seconds:
        return None
    # The percentile between two values is undefined when one of them is infinite.
    low, high = (float(np.percentile(seconds, 99, method=m)) for m in ("lower", "higher"))
    if math.isinf(high):
        return math.inf if len(seconds) < 100 or math.isinf(low) else low * 1000
    return float(np.percentile(seconds, 99)) * 1000


def _mean_ms(seconds: Sequence[float]) -> float | None:
    return float(np.mean(seconds)) * 1000 if seconds else None
