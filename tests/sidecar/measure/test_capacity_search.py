"""The capacity search, on services of known capacity: which rates it tries and what it finds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.config.schema import Objective
from sidecar.config.slo import Slo
from sidecar.measure.capacity_search import RateResult, capacity, next_lower_rate, next_rate
from sidecar.measure.measurement import measure
from sidecar.measure.requests import LoadResult, RequestResult
from sidecar.measure.verdict import scores, value


def searched(true_capacity: float, base: float, highest: float) -> list[RateResult]:
    tried: list[RateResult] = []
    while (rate := next_rate(tried, base, highest)) is not None:
        tried.append(RateResult(rate, rate <= true_capacity))
        assert len(tried) < 20
    return tried


@given(st.floats(0.1, 1000), st.floats(0.01, 10), st.floats(1, 64))
def test_the_capacity_is_found_within_a_tenth(true_capacity: float, base: float, factor: float) -> None:
    highest = base * factor
    tried = searched(true_capacity, base, highest)
    found = capacity(tried)
    assert all(base <= t.rate <= highest for t in tried)
    if true_capacity < base:
        assert found is None
        assert len(tried) == 1
    elif true_capacity >= highest:
        assert found == pytest.approx(highest)
    else:
        assert found is not None
        assert true_capacity / 1.1 * 0.999 <= found <= true_capacity


@given(st.floats(0.001, 1000), st.floats(0.01, 100))
def test_the_search_below_a_missed_rate_is_short(true_capacity: float, missed: float) -> None:
    tried: list[RateResult] = []
    while (rate := next_lower_rate(tried, missed)) is not None:
        assert rate < missed
        tried.append(RateResult(rate, rate <= true_capacity))
    found = capacity(tried)
    assert 1 <= len(tried) <= 4
    if true_capacity < missed / 16:
        assert found is None
    elif found is not None and true_capacity < missed:
        above = min((t.rate for t in tried if not t.met), default=missed)
        assert found <= true_capacity < above <= 2 * found


def test_a_rate_that_missed_below_one_that_met_counts() -> None:
    assert capacity([RateResult(1, True), RateResult(4, True), RateResult(2, False)]) == 1
    assert capacity([RateResult(1, False), RateResult(2, True)]) is None


def served(rate: float, requests: int) -> LoadResult:
    return LoadResult(
        tuple(RequestResult(0.01, 0.1, (0.01,), start_s=number / rate) for number in range(requests)), requests / rate
    )


def test_value_and_scores_of_a_load() -> None:
    slo = Slo(ttft_p99_ms=100.0)
    load = served(4.0, 20)
    tried = (RateResult(2.0, True), RateResult(4.0, True), RateResult(8.0, False))
    assert value(measure(load, slo), Objective.CAPACITY, tried) == 4.0
    assert value(measure(load, slo), Objective.CAPACITY, tried[2:]) == 0.0
    gaps = scores(load, slo, Objective.CAPACITY)
    assert gaps == pytest.approx([0.25] * 19)
    late = RequestResult(1.0, 1.1, (0.01,), start_s=0.1)
    assert len(scores(LoadResult((*load.requests, late), 5.0), slo, Objective.CAPACITY)) == 19
