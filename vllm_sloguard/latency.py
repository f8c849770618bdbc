"""The latency statistics, defined once for the plugin and the sidecar. Pure.

- TTFT: from sending a request to its first token.
- ITL: the gap between two tokens of a request. A statistic of ITL is over all gaps of all requests.
- TPOT: the mean gap of one request. A statistic of TPOT is over requests.
- E2E latency: from sending a request to its last token.

A percentile is an order statistic (nearest rank): the smallest value that at least that share of the sample does not
exceed. Its confidence interval is distribution-free: the ranks between which the binomial distribution puts it.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

# Of a percentile's interval, and of whether a sample resolves a percentile at all.
CONFIDENCE = 0.99
# A gap this many times as long as an ITL limit is a stall: one is a miss, even in a request of so many tokens that its
# own p99 leaves room for it.
STALL_FACTOR = 10.0
# Neighbouring bucket bounds of a GapHistogram differ by this factor, so a percentile read from it is within 1%.
_GROWTH = 1.02
_LOG_GROWTH = math.log(_GROWTH)


@dataclass(frozen=True)
class Percentile:
    """A percentile of a sample with its confidence interval, in the unit of the sample.

    ``high`` is infinite where the sample is too small to bound it from above, ``low`` minus infinite likewise.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def resolved(self) -> bool:
        """Whether the sample is large enough to bound the percentile from above."""
        return math.isfinite(self.high)


def nearest_rank(n: int, share: float) -> int:
    """The rank (1 to n) of the ``share`` percentile of ``n`` ascending values."""
    # The product may be off by one unit in the last place: 0.07 * 100 is 7.000000000000001.
    return min(max(math.ceil(share * n - 1e-9), 1), n)


def percentile(values: Iterable[float], share: float) -> float | None:
    """The ``share`` (0.99 for p99) percentile of ``values``, which may be infinite; None for an empty sample."""
    ascending = sorted(values)
    return ascending[nearest_rank(len(ascending), share) - 1] if ascending else None


def percentile_interval(values: Iterable[float], share: float, confidence: float = CONFIDENCE) -> Percentile | None:
    """The percentile with its order-statistic interval; None for an empty sample."""
    ascending = sorted(values)
    n = len(ascending)
    if not n:
        return None
    low, high = interval_ranks(n, share, confidence)
    return Percentile(
        ascending[nearest_rank(n, share) - 1],
        ascending[low - 1] if low else -math.inf,
        ascending[high - 1] if high else math.inf,
        n,
    )


@lru_cache(maxsize=4096)
def interval_ranks(n: int, share: float, confidence: float = CONFIDENCE) -> tuple[int, int]:
    """The ranks of a one-sided lower and a one-sided upper bound on the percentile; 0 where ``n`` gives none.

    The value of rank r is an upper bound with probability P(Binomial(n, share) < r), each side at ``confidence``.
    """
    # Not scipy.stats, which takes 60 MiB; inside vLLM nobody asks.
    from scipy.special import bdtr  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    cumulative = cast(Callable[[int, int, float], float], bdtr)
    # The quantile q is the least with P(Binomial <= q) at that probability, so q + 1 is the upper bound's rank; and the
    # largest r with P(Binomial <= r - 1) no more than 1 - confidence is the lower one's.
    low, high = (
        bisect_left(range(n + 1), probability, key=lambda k: cumulative(k, n, share))
        for probability in (1 - confidence, confidence)
    )
    high += 1
    return low, high if high <= n else 0


def least_resolving(share: float, confidence: float = CONFIDENCE) -> int:
    """How many values a sample needs before its largest bounds the percentile: 459 for p99 at 99%."""
    return math.ceil(math.log(1 - confidence) / math.log(share))


def tpot(gaps: Sequence[float]) -> float | None:
    """A request's mean gap; None for a request of fewer than two tokens, which has no gap."""
    return math.fsum(gaps) / len(gaps) if len(gaps) else None


def itl_of_request(own: float, largest: float, limit: float) -> float:
    """The ITL by which one request is judged: the ``own`` percentile of its gaps, or its largest gap if that stalls.

    ``limit`` is that of the SLO, in the same unit.
    """
    return largest if largest > STALL_FACTOR * limit else own


@dataclass
class GapHistogram:
    """Counts of positive values in buckets whose bounds grow by 2%; histograms of the same kind add up.

    Bucket b holds the values in (1.02^(b-1), 1.02^b]; values are in seconds.
    """

    counts: dict[int, int] = field(default_factory=dict[int, int])

    def add(self, value: float, count: int = 1) -> None:
        """Counts a value; what is not positive counts as the smallest representable gap, a nanosecond."""
        bucket = math.ceil(math.log(max(value, 1e-9)) / _LOG_GROWTH)
        self.counts[bucket] = self.counts.get(bucket, 0) + count

    def merge(self, counts: Mapping[int, int]) -> None:
        """Adds another histogram's counts."""
        for bucket, count in counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count

    @property
    def n(self) -> int:
        """How many values were counted."""
        return sum(self.counts.values())

    def percentile(self, share: float) -> float | None:
        """The percentile, within 1%; None for an empty histogram."""
        n = self.n
        wanted = nearest_rank(n, share) if n else 0
        for bucket in sorted(self.counts):
            wanted -= self.counts[bucket]
            if wanted <= 0:
                return bucket_value(bucket)
        return None

    def over(self, limit: float) -> int:
        """How many values were above ``limit``; those in its own bucket count by the bucket's middle."""
        return sum(count for bucket, count in self.counts.items() if bucket_value(bucket) > limit)


def bucket_value(bucket: int) -> float:
    """The value in seconds that stands for everything in the bucket: its geometric middle."""
    return math.exp((bucket - 0.5) * _LOG_GROWTH)
