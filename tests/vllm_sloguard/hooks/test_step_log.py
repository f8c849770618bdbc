"""The gaps between tokens, from steps: of all requests together, and of each one."""

import pytest

from vllm_sloguard.hooks.step_log import StepLog
from vllm_sloguard.latency import GapHistogram


def steps(*gaps: float, running: int = 4) -> StepLog:
    """Steps 1, 2, …, in each of which ``running`` requests had the same gap."""
    log, at = StepLog(), 100.0
    log.add(0, at, [])
    for number, gap in enumerate(gaps, 1):
        at += gap
        log.add(number, at, [gap] * running)
    return log


def test_a_request_s_gaps_are_those_of_the_steps_it_ran_in() -> None:
    log = steps(0.01, 0.02, 2.0, 0.03)

    own = log.own_gaps(0, 4)
    assert own is not None
    assert (own.largest_s, own.p99_s) == pytest.approx((2.0, 2.0))
    later = log.own_gaps(3, 4)
    assert later is not None
    assert later.largest_s == pytest.approx(0.03)
    assert log.own_gaps(4, 4) is None


def test_one_stall_among_many_gaps_is_the_largest_but_not_the_p99() -> None:
    own = steps(*[0.01] * 150, 2.0).own_gaps(0, 151)

    assert own is not None
    assert (own.p50_s, own.p99_s, own.largest_s) == pytest.approx((0.01, 0.01, 2.0))


def test_a_preempted_request_has_a_gap_of_its_own() -> None:
    log = steps(*[0.01] * 10)

    own, other = log.own_gaps(0, 10, stalls=(0.7,)), log.own_gaps(0, 10)
    assert own is not None
    assert other is not None
    assert own.largest_s == pytest.approx(0.7)
    assert other.largest_s == pytest.approx(0.01)


def test_the_histogram_counts_every_gap_of_every_request_once() -> None:
    log = steps(*[0.01] * 99)
    log.add(100, 101.0, [0.01, 0.01, 3.0, 0.01])

    histogram = log.take_histogram()
    assert histogram.n == 400
    assert histogram.over(1.0) == 1
    assert histogram.percentile(0.5) == pytest.approx(0.01, rel=0.02)
    assert log.take_histogram().n == 0


@pytest.mark.parametrize("odd", [0, 255])
def test_in_a_large_batch_the_requests_at_its_ends_may_have_gaps_of_their_own(odd: int) -> None:
    """The scheduler's token budget runs out at the last request, which then skips a step."""
    log = steps(0.01)
    gaps = [0.01] * 256
    gaps[odd] = 0.02
    log.add(2, 100.02, gaps)

    histogram = log.take_histogram()
    assert histogram.n == 4 + 256
    assert histogram.over(0.015) == 1


def test_in_a_large_batch_a_resumed_request_may_be_anywhere() -> None:
    log = steps(0.01)
    gaps = [0.01] * 256
    gaps[77] = 2.0
    log.add(2, 100.02, gaps, resumed=True)

    assert log.take_histogram().over(1.0) == 1


def test_a_lagging_front_end_lengthens_the_gaps() -> None:
    log = StepLog()
    log.add(1, 10.0, [0.01])
    log.add(2, 12.0, [0.01])  # it came out two seconds later

    own = log.own_gaps(1, 2)
    assert own is not None
    assert own.largest_s == pytest.approx(2.0)
    assert log.take_histogram().over(1.0) == 1


def test_an_idle_engine_leaves_no_gap() -> None:
    log = steps(0.01, 0.01)
    log.add(3, 500.0, [])  # a first token after minutes of silence
    log.add(4, 500.01, [0.01])

    assert log.take_histogram().over(0.1) == 0


def test_the_steps_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_sloguard.hooks.step_log._MAX_STEPS", 100)
    log = steps(5.0, *[0.01] * 1000)

    own = log.own_gaps(0, 1001)
    assert own is not None
    assert own.largest_s == pytest.approx(0.01)


@pytest.mark.parametrize("count", [2, 64, 1000])
@pytest.mark.parametrize("other", [0.0102, 0.0098, 2.0])
def test_one_gap_that_differs_is_seen_in_a_batch_of_any_size(count: int, other: float) -> None:
    """Whether all gaps are equal is told by their sum."""
    log, expected = StepLog(), GapHistogram()
    for number, gaps in enumerate(([], [*[0.01] * (count - 1), other], [other, *[0.01] * (count - 1)])):
        log.add(number, 100.0 + number / 1000, gaps)
        for gap in gaps:
            expected.add(gap)

    assert log.take_histogram() == expected
