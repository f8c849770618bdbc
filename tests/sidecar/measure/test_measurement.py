"""The statistics of a load: one definition each, failures count as the slowest, and small samples are marked."""

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.config.schema import Objective
from sidecar.config.slo import LATENCY_STATISTICS, LatencyKind, Slo
from sidecar.measure.measurement import Measurement, measure, meets
from sidecar.measure.requests import LoadResult, RequestResult
from sidecar.measure.verdict import scores, value, violation
from sidecar.observe.user_requests import OwnItls, UserRequest, missed_slo

FAILED = RequestResult(None, None, (), "aborted after 3 of 9 tokens")


def ok(ttft_s: float = 0.1, e2e_s: float = 1.0, *itls_s: float) -> RequestResult:
    return RequestResult(ttft_s, e2e_s, itls_s)


def load(*requests: RequestResult, duration_s: float = 10.0) -> LoadResult:
    return LoadResult(requests, duration_s)


def test_latencies_are_milliseconds() -> None:
    result = measure(load(ok(0.1, 1.0, 0.02, 0.04)), Slo(ttft_p99_ms=500))

    assert (result.ttft_p99_ms, result.e2e_p99_ms) == (pytest.approx(100), pytest.approx(1000))
    assert (result.ttft_mean_ms, result.e2e_mean_ms) == (pytest.approx(100), pytest.approx(1000))


def test_itl_is_over_gaps_and_tpot_over_requests() -> None:
    """Nine requests of one gap and one of ninety: most gaps are the long request's, most requests are short."""
    short = [ok(0.1, 1.0, 0.010)] * 9
    long = ok(0.1, 5.0, *[0.050] * 90)

    result = measure(load(*short, long), Slo(itl_p99_ms=100))

    assert (result.itl_p50_ms, result.tpot_p50_ms) == (pytest.approx(50), pytest.approx(10))
    assert result.itl_mean_ms == pytest.approx((9 * 10 + 90 * 50) / 99)
    assert result.tpot_mean_ms == pytest.approx((9 * 10 + 50) / 10)


def test_the_throughput_is_of_streamed_tokens_of_requests_that_succeeded() -> None:
    measured = measure(
        load(ok(0.1, 1.0, 0.1, 0.2), ok(0.1, 1.0), RequestResult(None, None, (), "refused")), Slo(ttft_p99_ms=500)
    )
    assert measured.output_tokens_per_s == pytest.approx((3 + 1) / 10)


def test_percentiles_are_values_of_the_sample() -> None:
    """Nearest rank: the p99 of 200 values is the 198th, not a point between two of them."""
    result = measure(load(*[ok(0.001 * rank) for rank in range(1, 201)]), Slo(ttft_p95_ms=500))

    assert result.ttft_p50_ms == pytest.approx(100)
    assert result.ttft_p90_ms == pytest.approx(180)
    assert result.ttft_p95_ms == pytest.approx(190)
    assert result.ttft_p99_ms == pytest.approx(198)


@given(st.lists(st.tuples(st.floats(0.001, 9), st.lists(st.floats(0.001, 9), max_size=5)), min_size=1, max_size=40))
def test_every_statistic_is_measured_and_they_are_in_order(rows: list[tuple[float, list[float]]]) -> None:
    requests = [RequestResult(ttft, ttft + sum(gaps), tuple(gaps)) for ttft, gaps in rows]
    result = measure(load(*requests), Slo(e2e_p99_ms=100))

    for kind in LatencyKind:
        values = [result.latency_ms(s) for s in LATENCY_STATISTICS if s.kind is kind and s.statistic.share]
        found = [v for v in values if v is not None]
        assert len(found) in {0, 4}
        assert found == sorted(found)
    assert result.e2e_mean_ms == pytest.approx(statistics.fmean(r.e2e_s or 0.0 for r in requests) * 1000)


@pytest.mark.parametrize(
    ("good", "failed", "infinite"),
    [(200, 0, False), (199, 1, False), (197, 3, True), (190, 10, True), (9, 1, True), (99, 1, False), (98, 2, True)],
)
def test_failures_are_the_slowest_requests(good: int, failed: int, infinite: bool) -> None:
    result = measure(load(*[ok(0.1, 1.0, 0.02)] * good, *[FAILED] * failed), Slo(ttft_p99_ms=500))

    assert result.failed == failed
    assert result.error_rate == failed / (good + failed)
    for p99_ms in (result.ttft_p99_ms, result.e2e_p99_ms, result.tpot_p99_ms):
        assert (p99_ms == math.inf) is infinite
    assert result.e2e_mean_ms == pytest.approx(1000)  # of those that succeeded


@settings(max_examples=60)
@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=250), st.integers(0, 10))
def test_one_more_failure_never_improves_a_statistic(latencies: list[float], failed: int) -> None:
    slo = Slo(e2e_p99_ms=1000, error_rate=0.0)
    requests = [ok(0.001, latency) for latency in latencies]
    before = measure(load(*requests, *[FAILED] * failed), slo)
    after = measure(load(*requests, *[FAILED] * (failed + 1)), slo)

    assert before.e2e_p99_ms is not None
    assert after.e2e_p99_ms is not None
    assert after.e2e_p99_ms >= before.e2e_p99_ms
    assert violation(after, slo) >= violation(before, slo)
    assert violation(after, slo) > 0


@pytest.mark.parametrize(("requests", "resolved"), [(80, False), (458, False), (459, True), (600, True)])
def test_a_p99_of_too_few_requests_is_marked(requests: int, resolved: bool) -> None:
    slo = Slo(ttft_p99_ms=500, ttft_p50_ms=300, e2e_mean_ms=2000)
    result = measure(load(*[ok(0.001 * rank) for rank in range(1, requests + 1)]), slo)

    p50, p99 = result.intervals  # a mean has no interval
    assert (p50.name, p50.resolved) == ("ttft_p50_ms", True)
    assert (p99.name, p99.n, p99.needed, p99.resolved) == ("ttft_p99_ms", requests, 459, resolved)
    assert (p99.high_ms is not None) is resolved
    assert result.unresolved == (() if resolved else (p99,))
    assert p50.low_ms is not None
    assert p50.high_ms is not None
    assert result.ttft_p50_ms is not None
    assert p50.low_ms < result.ttft_p50_ms < p50.high_ms


def test_goodput_counts_requests_within_every_limit() -> None:
    slo = Slo(ttft_p99_ms=200, tpot_p99_ms=30, itl_p99_ms=50, e2e_p99_ms=2000)
    within = ok(0.2, 2.0, 0.02, 0.04)  # its mean gap is at the limit
    late, slow, stalled, long = ok(0.201), ok(0.1, 1.0, 0.02, 0.05), ok(0.1, 1.0, 0.01, 0.051), ok(0.1, 2.001, 0.01)
    sent = load(within, late, slow, stalled, long, FAILED, duration_s=4.0)

    result = measure(sent, slo)

    assert result.goodput_rps == 1 / 4
    assert result.goodput_share == 1 / 6
    assert value(result, Objective.GOODPUT) == 1 / 4
    assert scores(sent, slo, Objective.GOODPUT) == (0.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def test_one_stall_of_two_seconds_is_a_miss_of_the_itl_limit() -> None:
    """The mean gap of the request, 63 ms, would pass."""
    stalled = ok(0.1, 5.0, *[0.03] * 58, 2.0)

    assert not meets(stalled, Slo(itl_p99_ms=100, e2e_p99_ms=5000))
    assert meets(stalled, Slo(tpot_p99_ms=100, e2e_p99_ms=5000))
    assert violation(measure(load(*[stalled] * 20), Slo(itl_p99_ms=100)), Slo(itl_p99_ms=100)) > 0


def test_a_request_is_held_to_the_highest_percentile_of_each_kind_and_to_no_mean() -> None:
    slo = Slo(ttft_p50_ms=100, ttft_p99_ms=500, e2e_mean_ms=900)

    assert [limit.name for limit in slo.per_request] == ["ttft_p99_ms"]
    assert meets(ok(0.4, 2.0), slo)
    assert not meets(ok(0.6, 0.7), slo)


def test_a_measurement_of_an_earlier_version_can_be_read() -> None:
    old = Measurement(200, 0, 50.0, 10.0, 5.0, 120.0, 8.0, 80.0, 4.0)

    assert (old.ttft_p95_ms, old.goodput_share, old.unresolved) == (None, None, ())


@pytest.mark.parametrize(("longest_s", "good"), [(0.1, True), (0.49, True), (0.51, False)])
def test_a_stall_is_a_miss_even_in_a_request_whose_own_p99_has_room_for_it(longest_s: float, good: bool) -> None:
    """Trials judge a request as probation and metrics do: ten times the limit is a stall."""
    slo = Slo(itl_p99_ms=50)
    gaps_s = (longest_s, *[0.010] * 199)

    assert meets(ok(0.1, 5.0, *gaps_s), slo) is good
    own = OwnItls(10.0, 10.0, 10.0, 10.0, longest_s * 1000)
    assert missed_slo(UserRequest(0.0, 100.0, 10.0, 5000.0, 10, 200, itl=own), slo) is not good
