"""The loads of a trial: one at the configured rate, or for capacity as many as the search needs. Pure.

A load whose sender fell behind is repeated once and never counts. For capacity, a rate counts as met only in a steady
state; a load that was too short for that is repeated once, for longer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sidecar.config.schema import Objective, Workload
from sidecar.config.slo import Slo
from sidecar.measure.capacity_search import RateResult, next_lower_rate, next_rate
from sidecar.measure.early_stop import NO_NEEDS, Rules, SearchNeeds
from sidecar.measure.measurement import measure
from sidecar.measure.partial_load import EarlyStop
from sidecar.measure.requests import LoadResult, StopRule, to_the_end
from sidecar.measure.sender_lag import sender_lag
from sidecar.measure.steady_state import SteadyState, lasting, least_duration_s, settling_s, steady_state
from sidecar.measure.verdict import slo_limits, violation

# Multiple of the configured rate; for capacity without highest_rate.
_HIGHEST_RATE = 16.0
_LONGEST_S = 180.0
_MAX_ATTEMPTS = 2  # at one rate
# Of a start that is not measured.
WARM_START_LOAD_S, _FEWEST_WARM = 5.0, 10
_FEWEST_REQUESTS = 50  # of a load at a lower rate


@dataclass(frozen=True)
class RateLoad:
    """A load at ``rate`` requests per second."""

    rate: float
    load: LoadResult


class Loads(Protocol):
    """Schedules the loads of one engine."""

    def next_load(self, done: Sequence[RateLoad], *, warm: bool) -> Workload | None:
        """The next load; None if there is none. ``warm``: the engine needs no warm-up."""
        ...

    def stop_rule(self, rate: float) -> StopRule:
        """The stop rule for a load at ``rate``."""
        ...


@dataclass(frozen=True)
class LoadSchedule:
    """``compared`` loads (of a validation) have equal sizes, at least ``least_requests``, and are not ended early.

    A ``thorough`` load is stopped early by arithmetic only, any other as soon as it has given what the search
    ``needs``. ``below``: the loads search for the highest rate below this one, which missed the SLO, that meets it.
    """

    slo: Slo
    workload: Workload
    objective: Objective
    confidence: float
    compared: bool = False
    thorough: bool = False
    least_requests: int = 0
    needs: SearchNeeds = NO_NEEDS
    below: float | None = None

    def next_load(self, done: Sequence[RateLoad], *, warm: bool) -> Workload | None:
        """The next load; None once everything is known. ``warm``: the engine needs no warm-up."""
        rate = self._next_rate(done)
        if rate is None:
            return None
        repeated = [d for d in done if d.rate == rate]
        least_s = max([least_duration_s(self.slo), *(settling_s(d.load) for d in repeated)])
        return self.workload.model_copy(
            update={
                "rate": rate,
                # New prompts: those of the previous load are in the engine's prefix cache.
                "seed": self.workload.seed + len(done),
                "requests": self._requests(rate, min(least_s, _LONGEST_S)),
                "warmup_requests": 0 if done or warm else self.workload.warmup_requests,
            }
        )

    def stop_rule(self, rate: float) -> StopRule:
        """The stop rule for a load at ``rate``."""
        if self.compared:
            return to_the_end
        workload = self.workload.model_copy(update={"rate": rate})
        return lasting(Rules(self.slo, workload, self.confidence, self.thorough, self.needs), self.slo)

    def counted(self, done: Sequence[RateLoad]) -> tuple[RateLoad, ...]:
        """The last load at each rate, except those whose sender fell behind."""
        last = {d.rate: d for d in done}
        return tuple(d for d in last.values() if not fell_behind(d.load, self.slo))

    def tried(self, done: Sequence[RateLoad]) -> tuple[RateResult, ...]:
        """For capacity: the measured rates, and whether they met the SLO."""
        return tuple(RateResult(d.rate, self._met(d.load), self._worst(d.load)) for d in self.counted(done))

    def _next_rate(self, done: Sequence[RateLoad]) -> float | None:
        if done and self._again(done):
            return done[-1].rate
        if done and (self.objective is not Objective.CAPACITY or fell_behind(done[-1].load, self.slo)):
            return None
        if self.below is not None:
            return next_lower_rate(self.tried(done), self.below)
        highest = self.workload.highest_rate or _HIGHEST_RATE * self.workload.rate
        return next_rate(self.tried(done), self.workload.rate, highest)

    def _again(self, done: Sequence[RateLoad]) -> bool:
        """Whether the last load must be repeated."""
        load, attempts = done[-1].load, sum(d.rate == done[-1].rate for d in done)
        if attempts >= _MAX_ATTEMPTS:
            return False
        if fell_behind(load, self.slo):
            return True
        too_short = not isinstance(load.ending, EarlyStop) and steady_state(load, self.slo) is SteadyState.TOO_SHORT
        return self.objective is Objective.CAPACITY and too_short

    def _requests(self, rate: float, least_s: float) -> int:
        base = max(self.workload.fixed_requests, self.least_requests) if self.compared else self.workload.most_requests
        # If the operator has fixed the number of requests, a mean latency is measured over exactly that number.
        if self.workload.requests is not None and self.objective is Objective.LATENCY:
            return base
        if self.below is not None:  # no longer than a load at the configured rate
            base = max(math.ceil(base * rate / self.below), _FEWEST_REQUESTS)
        return max(base, math.ceil(rate * least_s))

    def _worst(self, load: LoadResult) -> float | None:
        """The largest measured share of a limit; a lower bound for a stopped load."""
        measured = load.ending.bounds if isinstance(load.ending, EarlyStop) else measure(load, self.slo)
        found = slo_limits(measured, self.slo)
        shares = (limit.measured / limit.limit for limit in found if limit.measured is not None and limit.limit)
        return max(shares, default=None)

    def _met(self, load: LoadResult) -> bool:
        if isinstance(load.ending, EarlyStop) or violation(measure(load, self.slo), self.slo) > 0:
            return False
        return steady_state(load, self.slo) in (SteadyState.STEADY, None)


@dataclass(frozen=True)
class WarmStartLoad:
    """The first few seconds of ``schedule``: enough for an engine to fill the caches for later starts."""

    schedule: LoadSchedule

    def next_load(self, done: Sequence[RateLoad], *, warm: bool) -> Workload | None:
        """One load."""
        first = self.schedule.next_load([], warm=warm)
        if done or first is None:
            return None
        requests = min(first.most_requests, max(math.ceil(first.rate * WARM_START_LOAD_S), _FEWEST_WARM))
        return first.model_copy(update={"requests": requests})

    def stop_rule(self, rate: float) -> StopRule:
        """Never ends a load early."""
        return to_the_end


def fell_behind(load: LoadResult, slo: Slo) -> bool:
    """Whether requests were sent too late for ``load`` to count as a measurement."""
    lag = sender_lag(load, slo)
    return lag is not None and lag.fell_behind
