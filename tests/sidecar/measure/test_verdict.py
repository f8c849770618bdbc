"""Whether a measurement meets the SLO, and its objective value."""

import math

import pytest
from sidecar_cases import measured

from sidecar.config.schema import Objective
from sidecar.config.slo import Slo
from sidecar.measure.measurement import measure
from sidecar.measure.requests import LoadResult, RequestResult
from sidecar.measure.verdict import scores, slo_limits, value, violation

FAILED = RequestResult(None, None, (), "aborted after 3 of 9 tokens")


def ok(ttft_s: float = 0.1, e2e_s: float = 1.0, *itls_s: float) -> RequestResult:
    return RequestResult(ttft_s, e2e_s, itls_s)


def load(*requests: RequestResult, duration_s: float = 10.0) -> LoadResult:
    return LoadResult(requests, duration_s)


def test_an_unmeasured_limit_is_not_met() -> None:
    # Single-token requests have no ITL.
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


def test_latency_is_better_when_it_is_lower() -> None:
    sent = load(ok(0.1, 1.0), ok(0.1, 3.0), FAILED)
    slo = Slo(ttft_p99_ms=500)

    assert value(measure(sent, slo), Objective.LATENCY) == pytest.approx(-2000)
    assert scores(sent, slo, Objective.LATENCY) == (1.0, 3.0, math.inf)


@pytest.mark.parametrize(("slow", "excess"), [(2, 0.0), (4, 1.0)])
def test_goodput_counts_requests_that_miss_any_limit(slow: int, excess: float) -> None:
    """Half of them are slow to their first token, the others to their last; each p90 is met."""
    slo = Slo(ttft_p90_ms=200, e2e_p90_ms=2000, goodput=0.98)
    missed = [ok(0.3)] * (slow // 2) + [ok(e2e_s=3.0)] * (slow // 2)
    result = measure(load(*missed, *[ok()] * (100 - slow)), slo)

    found = {limit.name: limit for limit in slo_limits(result, slo)}
    assert found["miss_rate"].measured == pytest.approx(slow / 100)
    assert {name for name, limit in found.items() if limit.excess} == ({"miss_rate"} if excess else set())
    assert violation(result, slo) == pytest.approx(excess / 4)


def test_a_journal_without_goodput_has_not_measured_it() -> None:
    slo = Slo(ttft_p99_ms=500, goodput=0.9)

    assert violation(measured(), slo) == pytest.approx(1 / 3)
