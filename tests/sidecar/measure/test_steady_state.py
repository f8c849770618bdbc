"""Steady state: an overload is detected however short the configured load, and late senders invalidate a load."""

import pytest
from simulated_service import SimulatedService

from sidecar.config.schema import Objective, Workload
from sidecar.config.slo import Slo
from sidecar.measure.capacity_search import capacity
from sidecar.measure.load_schedule import LoadSchedule, RateLoad, fell_behind
from sidecar.measure.measurement import measure
from sidecar.measure.requests import End, Ending, LoadProgress, LoadResult, RequestResult
from sidecar.measure.sender_lag import sender_lag
from sidecar.measure.steady_state import SteadyState, lasting, least_duration_s, overload, sending_s, steady_state

# Two sequences and 36 ms per request: at most 56 requests per second.
TWO_SEATS = SimulatedService(seats=2, service_s=0.036)
SLO = Slo(ttft_p99_ms=2000)


def schedule(objective: Objective, slo: Slo = SLO, *, compared: bool = False, **workload: float) -> LoadSchedule:
    given = Workload.model_validate({"rate": 10.0, "requests": 80, **workload})
    return LoadSchedule(slo, given, objective, 0.98, compared=compared, least_requests=77)


@pytest.mark.parametrize("seed", range(5))
def test_the_capacity_is_no_more_than_the_engine_can_serve(seed: int) -> None:
    """80 requests at 160/s take half a second, too short for a queue to show."""
    capacity_schedule = schedule(Objective.CAPACITY, seed=100 * seed)

    done = TWO_SEATS.run(capacity_schedule)

    found = capacity(capacity_schedule.tried(done))
    assert found is not None
    assert 0.75 * TWO_SEATS.capacity <= found <= 1.1 * TWO_SEATS.capacity
    half_a_second = TWO_SEATS.load(160.0, 80)
    assert measure(half_a_second, SLO).ttft_p99_ms is not None
    assert (measure(half_a_second, SLO).ttft_p99_ms or 0.0) < 2000
    assert steady_state(half_a_second, SLO) is SteadyState.TOO_SHORT


@pytest.mark.parametrize(
    ("service", "slo"),
    [
        (SimulatedService(4, 0.1), Slo(ttft_p99_ms=500)),
        (SimulatedService(32, 2.0), Slo(ttft_p99_ms=1000)),
        (SimulatedService(8, 0.5), Slo(e2e_p95_ms=3000)),
        (SimulatedService(16, 4.0), Slo(ttft_p90_ms=800, e2e_p99_ms=20_000)),
    ],
)
def test_capacities_of_other_services_are_found(service: SimulatedService, slo: Slo) -> None:
    searching = schedule(Objective.CAPACITY, slo, rate=service.capacity / 8)

    done = service.run(searching)

    found = capacity(searching.tried(done))
    assert found is not None
    assert 0.6 * service.capacity <= found <= 1.1 * service.capacity


def test_a_rate_that_is_never_missed_is_the_highest_tried() -> None:
    searching = schedule(Objective.CAPACITY, highest_rate=30.0)

    tried = searching.tried(TWO_SEATS.run(searching))

    assert all(load.worst is not None and (load.worst <= 1) is load.met for load in tried)
    assert all(t.met for t in tried)
    assert capacity(tried) == 30.0


@pytest.mark.parametrize(
    ("rate", "requests", "state"),
    [
        (40.0, 900, SteadyState.STEADY),
        (90.0, 2000, SteadyState.GROWING),
        (160.0, 80, SteadyState.TOO_SHORT),
        (40.0, 80, SteadyState.TOO_SHORT),
    ],
)
def test_states(rate: float, requests: int, state: SteadyState) -> None:
    load = TWO_SEATS.load(rate, requests)

    assert steady_state(load, SLO) is state
    assert measure(load, SLO).steady is state
    assert (overload(load) > 0.3) is (state is SteadyState.GROWING or rate == 160.0)


def test_a_load_below_capacity_is_rarely_called_growing() -> None:
    service = SimulatedService(seats=16, service_s=1.0)
    states = [steady_state(service.load(13.0, 400, seed), Slo(ttft_p99_ms=1000)) for seed in range(100)]

    assert states.count(SteadyState.GROWING) <= 3
    assert states.count(SteadyState.STEADY) >= 95


@pytest.mark.parametrize(
    ("slo", "least_s"),
    [
        (Slo(ttft_p99_ms=500), 5.0),
        (Slo(ttft_p99_ms=2000, e2e_p99_ms=30_000), 20.0),
        (Slo(e2e_p95_ms=30_000), 60.0),
        (Slo(itl_p99_ms=50), 5.0),
        (Slo(itl_p99_ms=50, ttft_mean_ms=200), 2.0),
    ],
)
def test_a_load_lasts_ten_times_the_tightest_limit_and_a_minute_at_most(slo: Slo, least_s: float) -> None:
    assert least_duration_s(slo) == pytest.approx(least_s)


@pytest.mark.parametrize(
    ("objective", "requests", "sent"),
    [
        (Objective.LATENCY, 80, 80),  # the configured number
        (Objective.LATENCY, None, 2000),
        (Objective.GOODPUT, 80, 2000),
        (Objective.CAPACITY, 80, 2000),
    ],
)
def test_loads_are_made_long_enough(objective: Objective, requests: int | None, sent: int) -> None:
    found = LoadSchedule(SLO, Workload(rate=100, requests=requests), objective, 0.98).next_load([], warm=False)

    assert found is not None
    assert found.requests == sent


def test_compared_loads_are_of_one_size_and_not_ended_early() -> None:
    found = schedule(Objective.GOODPUT, compared=True)

    first, second = (found.next_load([], warm=warm) for warm in (False, True))

    assert first is not None
    assert second is not None
    assert first.requests == second.requests == 200  # 20 s at 10/s
    assert found.stop_rule(10.0)(LoadProgress(1e3, 200, (), ())) is None


def test_enough_waits_until_a_queue_would_show_and_a_stop_does_not() -> None:
    sent = tuple(RequestResult(0.1, 0.2, (), "", float(at), float(at)) for at in range(5))

    def at(now_s: float, how: End) -> Ending | None:
        ending = Ending(how, "seen")
        return lasting(lambda _: ending, SLO)(LoadProgress(now_s, 500, sent, ()))

    assert at(19.0, End.ENOUGH) is None
    assert at(20.0, End.ENOUGH) == Ending(End.ENOUGH, "seen")
    assert at(1.0, End.STOP) == Ending(End.STOP, "seen")


def test_a_sender_that_fell_behind_is_seen() -> None:
    on_time, behind = TWO_SEATS.load(40.0, 900, lag_s=0.15), TWO_SEATS.load(40.0, 900, lag_s=0.25)

    assert not fell_behind(on_time, SLO)  # 200 ms are allowed
    assert fell_behind(behind, SLO)
    lag = sender_lag(behind, SLO)
    assert lag is not None
    assert (lag.late, lag.requests, lag.allowed_s) == (900, 900, pytest.approx(0.2))
    assert lag.p99_s == pytest.approx(0.25)
    assert "900 of 900 requests were sent more than 200 ms late (p99 250 ms)" in lag.reason
    assert measure(behind, SLO).sender_lag_p99_ms == pytest.approx(250)


def test_a_few_late_requests_do_not_spoil_a_load() -> None:
    load = TWO_SEATS.load(40.0, 900)
    late = tuple(
        RequestResult(r.ttft_s, r.e2e_s, r.itls_s, "", r.start_s, (r.intended_s or 0.0) - (0.5 if n < 40 else 0.0))
        for n, r in enumerate(load.requests)
    )

    assert not fell_behind(LoadResult(late, load.duration_s), SLO)


def test_a_load_whose_sender_fell_behind_is_repeated_once() -> None:
    found = schedule(Objective.LATENCY)
    behind = RateLoad(10.0, TWO_SEATS.load(10.0, 80, lag_s=0.5))
    good = RateLoad(10.0, TWO_SEATS.load(10.0, 80))

    assert found.next_load([behind], warm=False) is not None
    assert found.next_load([behind, good], warm=False) is None
    assert found.next_load([behind, behind], warm=False) is None
    assert found.counted([behind, good]) == (good,)
    assert found.counted([behind, behind]) == ()


def test_a_capacity_ends_at_the_last_rate_that_could_be_sent() -> None:
    found = schedule(Objective.CAPACITY)
    good = RateLoad(10.0, TWO_SEATS.load(10.0, 400))
    behind = RateLoad(20.0, TWO_SEATS.load(20.0, 400, lag_s=0.5))

    assert found.next_load([good, behind, behind], warm=False) is None
    tried = found.tried([good, behind, behind])
    assert capacity(tried) == 10.0
    assert all(t.met for t in tried)  # so it is a lower bound


def test_a_client_that_does_not_report_times_is_not_judged_by_them() -> None:
    load = LoadResult(tuple(RequestResult(0.1, 0.2, ()) for _ in range(80)), 1.0)

    assert (steady_state(load, SLO), sender_lag(load, SLO), sending_s(load)) == (None, None, 0.0)
