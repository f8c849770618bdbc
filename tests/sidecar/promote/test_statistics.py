"""The statistics of a promotion: the error is spent once, and simulated windows without a gain stay within it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.config.window import Promotion
from sidecar.promote.statistics import PAIRED_FROM, chance_of_success, compare, confidence_bounds, error_level

PLAN = Promotion().pairs
ALLOWED = 0.02
# One-sided normal quantile of 1 in 1000, for the error of a simulated share.
_WIDE = 3.09


def promoted(gain: float, spread: float, *, drift: float = 0.0, windows: int, seed: int) -> float:
    """The share of simulated windows in which an interim analysis finds the candidate surely better."""
    rng, found = np.random.default_rng(seed), 0
    for _ in range(windows):
        # In the order of time: incumbent, candidate, candidate, incumbent, ...
        starts = rng.normal(0.0, spread, 2 * PLAN[-1]) + np.cumsum(rng.normal(0.0, drift, 2 * PLAN[-1]))
        order = np.arange(2 * PLAN[-1]) % 4
        ours, theirs = starts[(order == 0) | (order == 3)], starts[(order == 1) | (order == 2)] + gain
        for pairs in PLAN:
            alpha = error_level(ALLOWED, PLAN, pairs, last=pairs == PLAN[-1])
            if compare(list(ours[:pairs]), list(theirs[:pairs]), alpha, floor=0.001).low > 0:
                found += 1
                break
    return found / windows


PLANS = st.lists(st.integers(2, 40), min_size=1, max_size=6, unique=True).map(sorted)


@given(plan=PLANS, end=st.integers(2, 40))
def test_the_levels_of_all_analyses_add_up_to_the_error(plan: list[int], end: int) -> None:
    """Also of a window that ends early, between two planned analyses or at one."""
    ended = min(end, plan[-1])
    taken = [pairs for pairs in plan if pairs < ended]

    levels = [error_level(ALLOWED, plan, pairs, last=False) for pairs in taken]
    final = error_level(ALLOWED, plan, ended, last=True)

    assert sum(levels) + final == pytest.approx(ALLOWED)
    assert min([*levels, final]) > 0


@pytest.mark.parametrize(("spread", "drift"), [(0.05, 0.0), (0.2, 0.0), (0.05, 0.025)])
def test_no_gain_is_found_at_most_as_often_as_allowed(spread: float, drift: float) -> None:
    windows = 2500
    found = promoted(0.0, spread, drift=drift, windows=windows, seed=1)

    assert found <= ALLOWED + _WIDE * math.sqrt(ALLOWED * (1 - ALLOWED) / windows)


def test_a_worse_candidate_is_hardly_ever_found_better() -> None:
    assert promoted(math.log(0.9), 0.1, windows=1000, seed=2) <= 0.01


@pytest.mark.parametrize(("spread", "drift", "least"), [(0.05, 0.0, 0.97), (0.1, 0.0, 0.55), (0.05, 0.025, 0.95)])
def test_power_for_ten_percent(spread: float, drift: float, least: float) -> None:
    """With three equal shares after 3, 5 and 8 pairs it was 84% and 24%."""
    assert promoted(-math.log(0.9), spread, drift=drift, windows=400, seed=3) >= least


def test_pairs_cancel_a_drift_that_they_share() -> None:
    rng = np.random.default_rng(4)
    drift = np.linspace(0.0, 1.0, PAIRED_FROM)
    ours, theirs = drift + rng.normal(0, 0.01, PAIRED_FROM), drift + 0.1 + rng.normal(0, 0.01, PAIRED_FROM)

    paired = compare(list(ours), list(theirs), 0.01, floor=0.001)
    few = compare(list(ours[:-1]), list(theirs[:-1]), 0.01, floor=0.001)

    assert paired.low > 0 > few.low
    assert (paired.won, paired.noise) == (PAIRED_FROM, pytest.approx(0.01, rel=0.5))


def test_the_chance_of_success_is_what_simulation_says() -> None:
    """Half of the pairs measured, the standard error known: the share of flat-prior futures that succeed."""
    rng, halfway, alpha, least = np.random.default_rng(5), 400, 0.01, 0.05
    ours = list(rng.normal(0.0, 0.1, halfway))
    theirs = [log + 0.03 / 2 for log in ours[::-1]]
    now = compare(ours, theirs, alpha, floor=0.001)

    truth = rng.normal(now.log_ratio, now.standard_error, 100_000)
    final = (now.log_ratio + rng.normal(truth, now.standard_error)) / 2
    success = np.mean((final >= least) & (final >= 2.326 * now.standard_error / math.sqrt(2)))

    assert chance_of_success(now, 0.5, alpha, least) == pytest.approx(float(success), abs=0.01)


def test_one_start_bounds_nothing() -> None:
    assert confidence_bounds([1.0], 0.05) == (-math.inf, math.inf)
