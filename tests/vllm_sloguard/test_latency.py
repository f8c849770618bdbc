"""The latency statistics: percentiles, their intervals, and histograms that add up."""

import math
import random

import pytest

from vllm_sloguard.latency import (
    GapHistogram,
    interval_ranks,
    least_resolving,
    nearest_rank,
    percentile,
    percentile_interval,
    tpot,
)


def test_a_percentile_is_a_value_of_the_sample() -> None:
    assert percentile([], 0.99) is None
    assert percentile([3.0], 0.5) == 3.0
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile(range(1, 101), 0.9) == 90
    assert percentile([1.0, math.inf], 0.99) == math.inf
    assert [nearest_rank(100, share) for share in (0.07, 0.5, 0.95, 0.999)] == [7, 50, 95, 100]


@pytest.mark.parametrize(("share", "n"), [(0.99, 459), (0.95, 90), (0.9, 44), (0.5, 7)])
def test_a_sample_too_small_to_bound_a_percentile_says_so(share: float, n: int) -> None:
    assert least_resolving(share) == n
    few, enough = percentile_interval(range(n - 1), share), percentile_interval(range(n), share)
    assert few is not None
    assert enough is not None
    assert not few.resolved
    assert enough.resolved
    assert enough.low <= enough.value <= enough.high


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_interval_covers_as_often_as_it_says(share: float) -> None:
    rng = random.Random(1)
    truth = -math.log(1 - share)  # of the exponential distribution
    above = below = 0
    for _ in range(2000):
        found = percentile_interval((rng.expovariate(1) for _ in range(600)), share, 0.95)
        assert found is not None
        above += found.low > truth
        below += found.high < truth
    # Both sides at 95%: at most 5% each, and one in a thousand draws of 2000 is above 6.6%.
    assert above / 2000 < 0.066
    assert below / 2000 < 0.066


def test_interval_ranks_are_tight() -> None:
    from scipy.stats import binom  # pyright: ignore[reportMissingTypeStubs]

    def cdf(count: int, n: int, share: float) -> float:
        return float(binom.cdf(count, n, share))  # pyright: ignore

    for n, share in ((459, 0.99), (1000, 0.99), (90, 0.95), (600, 0.5)):
        low, high = interval_ranks(n, share)
        assert cdf(high - 1, n, share) >= 0.99 > cdf(high - 2, n, share)
        assert low == 0 or cdf(low - 1, n, share) <= 0.01 < cdf(low, n, share)


def test_histograms_add_up_and_are_within_one_percent() -> None:
    rng = random.Random(2)
    values = [rng.lognormvariate(-4, 1) for _ in range(5000)]
    whole, half = GapHistogram(), GapHistogram()
    for number, value in enumerate(values):
        (whole if number % 2 else half).add(value)
    whole.merge(half.counts)
    assert whole.n == len(values)
    for share in (0.5, 0.9, 0.99):
        exact = percentile(values, share)
        found = whole.percentile(share)
        assert exact is not None
        assert found is not None
        assert abs(found / exact - 1) < 0.0101
    assert GapHistogram().percentile(0.99) is None
    stalled = GapHistogram()
    for gap in (0.01,) * 98 + (2.0,) * 2:
        stalled.add(gap)
    assert stalled.over(0.05) == 2
    assert stalled.percentile(0.99) == pytest.approx(2.0, rel=0.011)


def test_tpot_is_a_requests_mean_gap() -> None:
    assert tpot([]) is None
    assert tpot([0.1, 0.3]) == pytest.approx(0.2)
