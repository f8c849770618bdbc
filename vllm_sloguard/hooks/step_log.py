"""The gaps between tokens, from vLLM's steps. Pure arithmetic; it runs in the sending thread, never on vLLM's step.

A request that runs gets a token in every step, so its gaps are those of the steps between its first and last token. The
exception is a request that was preempted: its gap across the pause (``stalls``) is recorded apart. That leaves requests
that skip single steps without preemption (no token budget left, waiting for a grammar): their own largest gap is only a
lower bound. In a large batch the histogram over all requests counts their gaps if one of those looked at differs: the
first, the last, and every sixteenth. The scheduler runs short of tokens at the last request.
"""

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vllm_sloguard.latency import GapHistogram, nearest_rank

# 20 minutes of 50 steps/s. What began earlier is judged by the steps that are left.
_MAX_STEPS = 60_000
# By which the sum of equal gaps may differ from their product: rounding, far below any gap that differs.
_ROUNDING = 1e-9
# Of a larger batch only some gaps are read: they were written by another thread, and each costs a cache miss.
_MAX_READ, _STRIDE = 32, 16
_SHARES = (0.5, 0.9, 0.95, 0.99)


class OwnGaps(NamedTuple):
    """One request's gaps, in seconds: the largest, and percentiles by nearest rank."""

    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float
    largest_s: float


class StepLog:
    """The steps of one engine: a histogram of all gaps, and the gap that most requests had in each step."""

    def __init__(self) -> None:
        self._histogram = GapHistogram()
        self._numbers = array("Q")
        self._gaps = array("d")
        self._before: float | None = None

    def add(self, number: int, at: float, gaps: Sequence[float], *, resumed: bool = False) -> None:
        """Adds the step ``number``, processed at ``at`` (monotonic seconds), in which requests had these ``gaps``.

        ``resumed``: a preempted request ran again in it, so that its gap differs from those of the others.
        vLLM takes its gaps in the engine. A front end that lags adds to what its clients see, so no gap is shorter
        than the time since the front end processed the step before.
        """
        before, self._before = self._before, at
        if not gaps:
            return
        waited = 0.0 if before is None else at - before
        usual, count = gaps[0], len(gaps)
        read = gaps if resumed or count <= _MAX_READ else (*gaps[::_STRIDE], gaps[-1])
        # Adding up is twice as fast as comparing.
        if abs(sum(read) - len(read) * usual) <= _ROUNDING * len(read) * usual:
            usual = max(usual, waited)
            self._histogram.add(usual, count)
        else:
            counts = Counter(gaps)
            usual = max(max(counts, key=counts.__getitem__), waited)
            for gap, count in counts.items():
                self._histogram.add(max(gap, waited), count)
        self._numbers.append(number)
        self._gaps.append(usual)
        if len(self._numbers) > 2 * _MAX_STEPS:
            del self._numbers[:_MAX_STEPS], self._gaps[:_MAX_STEPS]

    def own_gaps(self, first: int, last: int, stalls: Sequence[float] = ()) -> OwnGaps | None:
        """The gaps of a request with its first token in step ``first`` and its last in step ``last``."""
        begin, end = bisect_right(self._numbers, first), bisect_right(self._numbers, last)
        own = np.array(self._gaps[begin:end])
        if stalls:
            own = np.append(own, stalls)
        if not len(own):
            return None
        own.sort()
        return OwnGaps._make(own[_ranks(len(own))].tolist())

    def take_histogram(self) -> GapHistogram:
        """The gaps since the last call."""
        taken, self._histogram = self._histogram, GapHistogram()
        return taken


@lru_cache(maxsize=4096)
def _ranks(n: int) -> list[int]:
    """The places of _SHARES and of the largest among ``n`` ascending values."""
    return [*(nearest_rank(n, share) - 1 for share in _SHARES), n - 1]
