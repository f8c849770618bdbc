"""A queue with a known capacity: ``seats`` requests at a time, each for ``service_s``; first come, first served."""

import heapq
import itertools
import random
from dataclasses import dataclass

from sidecar.config.schema import Workload
from sidecar.measure.load_schedule import LoadSchedule, RateLoad
from sidecar.measure.requests import LoadResult, RequestResult


@dataclass(frozen=True)
class SimulatedService:
    """At most ``seats / service_s`` requests a second, by Little's law."""

    seats: int
    service_s: float
    spread: float = 0.2  # of the service time, to either side

    @property
    def capacity(self) -> float:
        return self.seats / self.service_s

    def load(self, rate: float, requests: int, seed: int = 0, lag_s: float = 0.0) -> LoadResult:
        """Poisson arrivals; every request is waited for. ``lag_s`` is how late the sender is."""
        rng = random.Random(seed)
        free = [0.0] * self.seats
        results: list[RequestResult] = []
        arrivals = list(itertools.accumulate(rng.expovariate(rate) for _ in range(requests)))
        # As the load generator has them: the whole load takes requests / rate.
        for due in (at * requests / rate / arrivals[-1] for at in arrivals):
            start = due + lag_s
            begun = max(start, heapq.heappop(free))
            end = begun + self.service_s * rng.uniform(1 - self.spread, 1 + self.spread)
            heapq.heappush(free, end)
            ttft = begun - start + 0.1 * (end - begun)
            results.append(RequestResult(ttft, end - start, (0.9 * (end - begun),), "", start, due))
        first = min(r.start_s or 0.0 for r in results)
        last = max((r.start_s or 0.0) + (r.e2e_s or 0.0) for r in results)
        return LoadResult(tuple(results), last - first, requests)

    def send(self, workload: Workload) -> LoadResult:
        return self.load(workload.rate, workload.most_requests, workload.seed)

    def run(self, schedule: LoadSchedule) -> tuple[RateLoad, ...]:
        """Every load of a trial."""
        done: list[RateLoad] = []
        while (workload := schedule.next_load(done, warm=True)) is not None:
            done.append(RateLoad(workload.rate, self.send(workload)))
            assert len(done) < 40
        return tuple(done)
