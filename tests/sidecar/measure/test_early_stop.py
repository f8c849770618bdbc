"""When a load ends early: never against the verdict on the full load, and with the partial measurements."""

import math
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from sidecar.config.schema import Objective, Workload
from sidecar.config.slo import LATENCY_STATISTICS, Slo
from sidecar.measure.early_stop import Rules, SearchNeeds, surely_missed
from sidecar.measure.load_estimate import RunningLoad, estimate_load
from sidecar.measure.load_schedule import LoadSchedule, RateLoad
from sidecar.measure.measurement import measure
from sidecar.measure.partial_load import EarlyStop, StopReason, arrivals
from sidecar.measure.requests import End, Ending, InFlight, LoadProgress, LoadResult, RequestResult
from sidecar.measure.verdict import least_violation, slo_limits, violation
from sidecar.record.trial import Result
from sidecar.run.judging import judged_loads

WORKLOAD = Workload(rate=10, requests=300, input_tokens=16, output_tokens=8, spread=0.5)
ENDLESS = WORKLOAD.model_copy(update={"requests": None})
SLO = Slo(ttft_p99_ms=200, itl_p99_ms=50, e2e_p99_ms=2000)


def ok(start_s: float = 0.0, ttft_s: float = 0.1, itl_s: float = 0.01) -> RequestResult:
    return RequestResult(ttft_s, ttft_s + 7 * itl_s, (itl_s,) * 7, "", start_s)


def failed(start_s: float = 0.0) -> RequestResult:
    return RequestResult(None, None, (), "aborted after 3 of 8 tokens", start_s)


def progress(*finished: RequestResult, flying: tuple[InFlight, ...] = (), now_s: float = 10.0) -> LoadProgress:
    return LoadProgress(now_s, 300, finished, flying)


def test_an_early_stop_gives_its_reason_and_lower_bounds() -> None:
    slow = [ok(ttft_s=0.2 + 0.01 * (n + 1)) for n in range(17)]
    ending = Rules(SLO, WORKLOAD, 0.98)(progress(*slow, *[ok()] * 20))

    assert isinstance(ending, EarlyStop)
    assert ending.how is End.STOP
    assert ending.why == "17 of 300 requests were over ttft_p99_ms 200, 3 are allowed"
    # The p99 of 300 is at least the fourth largest so far; nothing is known about the others.
    assert ending.bounds.ttft_p99_ms == pytest.approx(340)
    assert ending.bounds.e2e_p99_ms == pytest.approx(410)
    assert ending.bounds.itl_p99_ms == pytest.approx(10)
    assert ending.bounds.e2e_mean_ms is None
    assert least_violation(ending.bounds, SLO) == pytest.approx(0.7 / 4)


@pytest.mark.parametrize(("slow", "ends"), [(3, False), (4, True)])
def test_one_in_a_hundred_is_allowed(slow: int, ends: bool) -> None:
    ending = Rules(SLO, WORKLOAD, 0.98)(progress(*[ok(ttft_s=0.3)] * slow, *[ok()] * 60))

    assert isinstance(ending, EarlyStop) is ends


def test_a_waiting_request_counts_with_its_age() -> None:
    waiting = tuple(InFlight(start_s, None) for start_s in (9.5, 9.6, 9.7, 9.79, 9.81, 9.9))
    flying = (*waiting, InFlight(9.0, 0.1))
    rules = Rules(SLO, WORKLOAD, 0.98)

    ending = rules(progress(*[ok()] * 60, flying=flying))
    assert isinstance(ending, EarlyStop)
    assert ending.why == "4 of 300 requests were over ttft_p99_ms 200, 3 are allowed"
    assert rules(progress(*[ok()] * 60, flying=flying[1:])) is None


@pytest.mark.parametrize(("count", "ends"), [(3, False), (4, True)])
def test_the_error_budget(count: int, ends: bool) -> None:
    slo = Slo(itl_p99_ms=50)
    ending = Rules(slo, WORKLOAD, 0.98)(progress(*[failed()] * count, *[ok()] * 60))

    assert isinstance(ending, EarlyStop) is ends
    if ending is not None:
        assert ending.why == "4 of 300 requests failed, 3 are allowed"


def test_times_between_tokens_are_of_tokens_not_of_requests() -> None:
    # 300 requests of at most 13 tokens: even with 100 ended, each of the rest may still have more than one slow gap.
    slow = RequestResult(0.1, 0.5, (0.06, *(0.01,) * 6), "", 0.0)
    rules = Rules(Slo(itl_p99_ms=50), WORKLOAD, 0.98)

    assert rules(progress(*[slow] * 30, *[ok()] * 70)) is None
    ending = rules(progress(*[slow] * 34, *[ok()] * 66))
    assert isinstance(ending, EarlyStop)
    assert ending.why == "34 of 3300 times between tokens were over itl_p99_ms 50, 33 are allowed"


def test_no_load_ends_before_the_minimum_number_of_requests() -> None:
    rules = Rules(SLO, WORKLOAD, 0.98)

    assert rules(progress(*[ok(ttft_s=1)] * 29)) is None
    assert isinstance(rules(progress(*[ok(ttft_s=1)] * 30)), EarlyStop)


def test_a_good_load_ends_as_sufficient_unless_it_is_thorough() -> None:
    quick = progress(*[ok(n / 10) for n in range(290)], now_s=30)
    ending = Rules(SLO, ENDLESS, 0.98)(quick)

    assert ending is not None
    assert ending.how is End.ENOUGH
    assert ending.why == "290 requests show every limit met, at confidence 98%"
    assert Rules(SLO, ENDLESS, 0.98, thorough=True)(quick) is None
    assert Rules(SLO, WORKLOAD, 0.98)(quick) is None


def growing(sent: int, growth: float = 0.5, thorough: bool = False, limit_ms: float = 15_000.0) -> Ending | None:
    """A load of 600 requests at 10 per second whose TTFT grows by ``growth`` seconds per second."""
    all_sent = [ok(n / 10, ttft_s=0.05 + growth * n / 10) for n in range(sent)]
    now_s = sent / 10
    ended = tuple(r for r in all_sent if (r.start_s or 0) + (r.e2e_s or 0) <= now_s)
    flying = tuple(InFlight(r.start_s or 0, None) for r in all_sent[len(ended) :])
    rules = Rules(Slo(ttft_p99_ms=limit_ms), WORKLOAD.model_copy(update={"requests": 600}), 0.98, thorough)
    return rules(LoadProgress(now_s, 600, ended, flying))


def test_a_steadily_growing_queue_ends_a_load_before_it_misses() -> None:
    ending = growing(240)

    assert isinstance(ending, EarlyStop)
    assert ending.why.startswith("over-saturated: TTFT grew from 4050 to ")
    assert "and would be 294" in ending.why  # 29.4 s after 588 of 600 requests
    assert ending.bounds.ttft_p99_ms == pytest.approx(29_440 / 1.5, rel=0.01)
    assert growing(240, limit_ms=20_000) is None  # it may still meet that limit
    assert growing(240, growth=0.1, limit_ms=2500) is None  # such slow growth may be chance
    assert growing(240, thorough=True) is None
    assert growing(150) is None


times = st.floats(0.001, 0.5)


def request(start_s: float, ttft_s: float, gaps: list[float], fails: bool) -> RequestResult:
    return failed(start_s) if fails else RequestResult(ttft_s, ttft_s + sum(gaps), tuple(gaps), "", start_s)


requests = st.builds(
    request, st.floats(0, 3), times, st.lists(times, max_size=12), st.sampled_from([False] * 30 + [True])
)


@settings(max_examples=300)
@given(
    st.lists(requests, min_size=2, max_size=150),
    st.floats(0.01, 4),
    st.sampled_from([0.0, 0.01, 0.1]),
    st.dictionaries(st.sampled_from([s.name for s in LATENCY_STATISTICS]), st.floats(10, 3000), min_size=1, max_size=4),
    st.none() | st.sampled_from([0.5, 0.9, 0.99]),
)
def test_arithmetic_never_ends_what_would_have_met_its_slo(
    load: list[RequestResult],
    now_s: float,
    error_rate: float,
    limits: dict[str, float],
    goodput: float | None,
) -> None:
    """Whatever the limits, what is in flight or not yet sent, and whether or not the requests in flight fail."""
    percentiles = any("_p" in name for name in limits)
    slo = Slo(**limits, error_rate=error_rate, goodput=goodput if percentiles else None)
    sent = [r for r in load if (r.start_s or 0) <= now_s]
    finished = tuple(r for r in sent if (r.start_s or 0) + (r.e2e_s or 0.3) <= now_s)
    flying = tuple(
        InFlight(r.start_s or 0, r.ttft_s if r.ttft_s and (r.start_s or 0) + r.ttft_s <= now_s else None)
        for r in sent
        if r not in finished
    )
    seen = LoadProgress(now_s, len(load), finished, flying)
    ending = surely_missed(arrivals(seen), now_s, len(load), slo, WORKLOAD)
    if ending is None:
        event("goes on")
        return
    whole = measure(LoadResult(tuple(load), 5.0), slo)
    assert violation(whole, slo) > 0
    assert 0 < least_violation(ending.bounds, slo) <= violation(whole, slo) + 1e-9
    ends = {limit.name: math.inf if limit.measured is None else limit.measured for limit in slo_limits(whole, slo)}
    for bound in slo_limits(ending.bounds, slo):
        assert bound.measured is None or bound.measured <= ends[bound.name] + 1e-6


@pytest.mark.parametrize(
    ("slo", "why"),
    [
        (Slo(ttft_p50_ms=50), "151 of 300 requests were over ttft_p50_ms 50, 150 are allowed"),
        (Slo(tpot_p90_ms=5), "151 of 300 requests were over tpot_p90_ms 5, 30 are allowed"),
        (Slo(ttft_p50_ms=50, goodput=0.6), "151 of 300 requests were over ttft_p50_ms 50, 150 are allowed"),
        (Slo(ttft_p50_ms=200, itl_p50_ms=5, goodput=0.6), "151 of 300 requests failed or were over a limit, 120 are"),
    ],
)
def test_arithmetic_covers_every_percentile_and_goodput(slo: Slo, why: str) -> None:
    ending = Rules(slo, WORKLOAD, 0.98)(progress(*[ok()] * 151))

    assert isinstance(ending, EarlyStop)
    assert ending.why.startswith(why)
    assert least_violation(ending.bounds, slo) > 0


@pytest.mark.parametrize("rest_ms", [0, 100])
def test_a_mean_ends_a_load_only_once_the_estimate_leaves_no_doubt(rest_ms: float) -> None:
    """240 requests of 170 ms miss a mean of 150 even if the other 60 take 71; they meet one of 169."""
    done = progress(*[ok(n / 10) for n in range(240)], now_s=24.5)

    assert Rules(Slo(e2e_mean_ms=169), WORKLOAD, 0.98)(done) is None
    ending = Rules(Slo(e2e_mean_ms=140), WORKLOAD, 0.98)(done)
    assert isinstance(ending, EarlyStop)
    assert "e2e_mean_ms" in ending.why


def compared(e2e_s: float, sent: int, needs: SearchNeeds, slo: Slo = SLO, spread: float = 0.05) -> Ending | None:
    """A load at 10 requests per second whose requests take ``e2e_s``, where those of the best one took 0.5 s."""
    all_sent = [RequestResult(0.1, e2e_s * (1 + spread * (-1) ** n), (0.01,) * 7, "", n / 10) for n in range(sent)]
    now_s = sent / 10 + 0.01
    ended = tuple(r for r in all_sent if (r.start_s or 0) + (r.e2e_s or 0) <= now_s)
    flying = tuple(InFlight(r.start_s or 0, 0.1) for r in all_sent[len(ended) :])
    return Rules(slo, WORKLOAD, 0.98, needs=needs)(LoadProgress(now_s, 300, ended, flying))


BEST = SearchNeeds(best=2, best_e2e_s=(0.5,) * 300)


def test_a_load_that_is_surely_better_ends_only_if_it_can_be_repeated() -> None:
    repeatable = replace(BEST, may_repeat=True)
    ending = compared(0.42, 180, repeatable)

    assert isinstance(ending, EarlyStop)
    assert ending.reason is StopReason.BETTER
    assert ending.estimate is not None
    assert ending.estimate.mean_ms == pytest.approx(420, rel=0.02)
    assert compared(0.42, 180, BEST) is None
    assert compared(0.42, 60, repeatable) is None  # too few to be sure of the p99
    assert compared(0.3, 180, repeatable) is None  # so different that it becomes the reference


def test_loads_stopped_for_being_better_raise_the_bar() -> None:
    raised = replace(BEST, bar=math.log(0.5), bar_sd=0.01)
    ending = compared(0.42, 180, raised)

    assert isinstance(ending, EarlyStop)
    assert ending.reason is StopReason.OUTPERFORMED


def test_a_limit_at_any_percentile_is_judged_by_its_own_share() -> None:
    """Of all requests 4% are slow: too many for a p99, not for a p95."""
    slow = [ok(n / 10, ttft_s=0.4 if n % 25 == 0 else 0.1) for n in range(200)]
    load = RunningLoad(arrivals(LoadProgress(21.0, 300, tuple(slow), ())), 21.0, 300, 10.0)

    def sigmas(slo: Slo) -> float:
        estimate = estimate_load(load, slo)
        assert estimate is not None
        return estimate.limits[0].sigmas

    assert sigmas(Slo(ttft_p99_ms=200)) > 3
    assert sigmas(Slo(ttft_p95_ms=200)) < 0
    assert sigmas(Slo(itl_p99_ms=5)) > 3  # every gap is 10 ms
    assert sigmas(Slo(itl_p99_ms=50)) < 0


def test_a_stopped_load_that_missed_the_slo_has_an_estimated_latency() -> None:
    slow = [ok(n / 10, ttft_s=0.4) for n in range(120)]
    schedule = LoadSchedule(SLO, WORKLOAD, Objective.LATENCY, 0.98)
    ending = schedule.stop_rule(10)(LoadProgress(13.0, 300, tuple(slow), ()))
    assert isinstance(ending, EarlyStop)
    load = LoadResult(tuple(slow), 13.0, planned=300, ending=ending)

    result = judged_loads(Result(), (RateLoad(WORKLOAD.rate, load),), schedule)

    assert result.violation > 0
    assert result.value == pytest.approx(-470, rel=0.02)
    goodput = judged_loads(Result(), (RateLoad(WORKLOAD.rate, load),), replace(schedule, objective=Objective.GOODPUT))
    assert goodput.value is None
