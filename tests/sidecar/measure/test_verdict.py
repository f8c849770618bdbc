"""From requests to a verdict: failures take for ever, and what was not measured is not met."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sidecar_cases import measured

from sidecar.config.schema import Objective, Slo
from sidecar.measure.requests import LoadResult, RequestResult
from sidecar.measure.verdict import measure, scores, slo_limits, value, violation

FAILED = RequestResult(None, None, (), "aborted after 3 of 9 tokens")


def ok(ttft_s: float = 0.1, e2e_s: float = 1.0, *itls_s: float) -> RequestResult:
    return RequestResult(ttft_s, e2e_s, itls_s)


def load(*requests: RequestResult, duration_s: float = 10.0) -> LoadResult:
    return LoadResult(requests, duration_s)


def test_latencies_are_milliseconds() -> None:
    result = measure(load(ok(0.1, 1.0, 0.02, 0.04)), Slo(ttft_p99_ms=500))

    assert (result.ttft_p99_ms, result.e2e_p99_ms) == (pytest.approx(100), pytest.approx(1000))
    assert result.itl_p99_ms == pytest.approx(20 + 0.99 * 20)
    assert (result.ttft_mean_ms, result.e2e_mean_ms) == (pytest.approx(100), pytest.approx(1000))


@pytest.mark.parametrize(
    ("good", "failed", "infinite"),
    [(200, 0, False), (199, 1, False), (197, 3, True), (190, 10, True), (9, 1, True), (99, 1, False), (98, 2, True)],
)
def test_failures_are_the_slowest_requests(good: int, failed: int, infinite: bool) -> None:
    result = measure(load(*[ok()] * good, *[FAILED] * failed), Slo(ttft_p99_ms=500))

    assert result.failed == failed
    assert result.error_rate == failed / (good + failed)
    assert (result.ttft_p99_ms == math.inf) is infinite
    assert (result.e2e_p99_ms == math.inf) is infinite
    assert result.e2e_mean_ms == pytest.approx(1000)  # of those that succeeded


@settings(max_examples=60)
@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=250), st.integers(0, 10))
def test_one_more_failure_never_looks_better(latencies: list[float], failed: int) -> None:
    slo = Slo(e2e_p99_ms=1000, error_rate=0.0)
    requests = [ok(0.001, latency) for latency in latencies]
    before = measure(load(*requests, *[FAILED] * failed), slo)
    after = measure(load(*requests, *[FAILED] * (failed + 1)), slo)

    assert before.e2e_p99_ms is not None
    assert after.e2e_p99_ms is not None
    assert after.e2e_p99_ms >= before.e2e_p99_ms
    assert violation(after, slo) >= violation(before, slo)
    assert violation(after, slo) > 0


def test_what_was_not_measured_is_not_met() -> None:
    # One token a request: there is no time between tokens.
    slo = Slo(itl_p99_ms=50)
    result = measure(load(ok(), ok()), slo)

    assert result.itl_p99_ms is None
    assert violation(result, slo) > 0
    assert [(limit.name, limit.excess) for limit in slo_limits(result, slo)] == [
        ("itl_p99_ms", 1.0),
        ("error_rate", 0.0),
    ]


def test_a_load_without_requests_meets_nothing() -> None:
    slo = Slo(ttft_p99_ms=500)
    result = measure(load(duration_s=0.0), slo)

    assert result.error_rate == 1.0
    assert result.goodput_rps == 0.0
    assert violation(result, slo) > 0
    assert value(result, Objective.LATENCY) is None


@pytest.mark.parametrize(
    ("ttft_p99_ms", "excess"), [(100, 0.0), (500, 0.0), (750, 0.5), (1000, 1.0), (math.inf, 10.0), (None, 1.0)]
)
def test_violation_is_the_mean_of_the_relative_excesses(ttft_p99_ms: float | None, excess: float) -> None:
    slo = Slo(ttft_p99_ms=500, e2e_p99_ms=500)

    # Of three limits, e2e and error_rate are met.
    assert violation(measured(ttft_p99_ms), slo) == pytest.approx(excess / 3)


def test_no_failure_is_allowed_where_the_limit_is_zero() -> None:
    slo = Slo(ttft_p99_ms=500, error_rate=0.0)

    assert violation(measured(failed=0), slo) == 0
    assert violation(measured(failed=1), slo) == pytest.approx(10 / 2)


def test_goodput_counts_requests_within_every_limit() -> None:
    slo = Slo(ttft_p99_ms=200, itl_p99_ms=30, e2e_p99_ms=2000)
    within = ok(0.2, 2.0, 0.02, 0.04)  # its mean time between tokens is at the limit
    late, slow, long = ok(0.201, 1.0, 0.01), ok(0.1, 1.0, 0.02, 0.05), ok(0.1, 2.001, 0.01)
    sent = load(within, late, slow, long, FAILED, duration_s=4.0)

    result = measure(sent, slo)

    assert result.goodput_rps == 1 / 4
    assert value(result, Objective.GOODPUT) == 1 / 4
    assert scores(sent, slo, Objective.GOODPUT) == (0.0, 1.0, 1.0, 1.0, 1.0)


def test_latency_is_better_when_it_is_lower() -> None:
    sent = load(ok(0.1, 1.0), ok(0.1, 3.0), FAILED)
    slo = Slo(ttft_p99_ms=500)

    assert value(measure(sent, slo), Objective.LATENCY) == pytest.approx(-2000)
    assert scores(sent, slo, Objective.LATENCY) == (1.0, 3.0, math.inf)
