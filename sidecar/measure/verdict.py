"""Whether a measurement meets the SLO, by how much it misses it, and its objective value. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sidecar.config.schema import Objective
from sidecar.config.slo import ERROR_RATE, MISS_RATE, Slo
from sidecar.measure.capacity_search import RateResult, capacity
from sidecar.measure.measurement import Measurement, meets, never_if_none
from sidecar.measure.requests import LoadResult

MAX_EXCESS = 10.0  # relative to the limit; larger excesses are capped


@dataclass(frozen=True)
class Limit:
    """One limit of the SLO and the measured value."""

    name: str
    limit: float
    measured: float | None

    @property
    def excess(self) -> float:
        """Excess relative to the limit; 0 when met, 1 when unmeasured, at most 10."""
        if self.measured is None:
            return 1.0
        if self.measured <= self.limit:
            return 0.0
        return min((self.measured - self.limit) / self.limit, MAX_EXCESS) if self.limit > 0 else MAX_EXCESS


def slo_limits(measurement: Measurement, slo: Slo) -> tuple[Limit, ...]:
    """All limits that the SLO sets."""
    latencies = (Limit(limit.name, limit.limit_ms, measurement.latency_ms(limit)) for limit in slo.latency_limits)
    shares = {ERROR_RATE: measurement.error_rate, MISS_RATE: measurement.miss_rate}
    return (*latencies, *(Limit(name, limit, shares[name]) for name, limit in slo.share_limits.items()))


def violation(measurement: Measurement, slo: Slo) -> float:
    """The mean excess over the limits; 0 when all are met."""
    excesses = [limit.excess for limit in slo_limits(measurement, slo)]
    return sum(excesses) / len(excesses)


def least_violation(bounds: Measurement, slo: Slo) -> float:
    """The same for lower bounds, where None is no information: the violation is at least this large."""
    found = slo_limits(bounds, slo)
    return sum(limit.excess for limit in found if limit.measured is not None) / len(found)


def value(measurement: Measurement, objective: Objective, tried: Sequence[RateResult] = ()) -> float | None:
    """The objective, higher is better: goodput in requests per second, or minus the mean latency in milliseconds.

    For capacity, the highest rate of ``tried`` that met the SLO; 0 if none did.
    """
    if objective is Objective.CAPACITY:
        return capacity(tried) or 0.0
    if objective is Objective.GOODPUT:
        return measurement.goodput_rps
    return None if measurement.e2e_mean_ms is None else -measurement.e2e_mean_ms


def in_its_unit(value: float | None, objective: Objective) -> float | None:
    """``value`` for display: a latency is positive, lower is better. None if unknown."""
    if value is None or not math.isfinite(value):
        return None
    return -value if objective is Objective.LATENCY else value


def scores(load: LoadResult, slo: Slo, objective: Objective) -> tuple[float, ...]:
    """Each request's part in the objective, lower is better: latency in seconds, or 0 if it met the SLO, else 1.

    For capacity, of the load at the highest rate that met the SLO: the seconds between completions within the SLO,
    whose mean is the inverse of the rate.
    """
    if objective is Objective.CAPACITY:
        return _gaps(load, slo)
    if objective is Objective.GOODPUT:
        return tuple(0.0 if meets(request, slo) else 1.0 for request in load.requests)
    return tuple(never_if_none(request.e2e_s) for request in load.requests)


def _gaps(load: LoadResult, slo: Slo) -> tuple[float, ...]:
    good = [r for r in load.requests if meets(r, slo)]
    ends = sorted(r.start_s + r.e2e_s for r in good if r.start_s is not None and r.e2e_s is not None)
    return tuple(later - earlier for earlier, later in pairwise(ends))
