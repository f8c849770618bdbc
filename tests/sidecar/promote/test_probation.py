"""When a promotion is taken back by itself, case by case."""

import random

import pytest

from sidecar.config.slo import Slo
from sidecar.config.window import Probation
from sidecar.observe.user_requests import Record, UserRequest, missed_slo, summarize
from sidecar.promote.probation import ProbationVerdict, binomial_tail, comparable, crash_loop, judge

SLO = Slo(ttft_p99_ms=500, itl_p99_ms=50, e2e_p99_ms=5000, error_rate=0.01)
RULE = Probation()


def requests(count: int, ttft_ms: float = 100.0, *, slow: int = 0, slow_ms: float = 0.0) -> list[UserRequest]:
    """``count`` requests of which the last ``slow`` ones take ``slow_ms`` to their first token."""
    times = [ttft_ms] * (count - slow) + [slow_ms] * slow
    return [UserRequest(float(i), ms, 10.0, 1000.0, 500, 100) for i, ms in enumerate(times)]


def before(count: int = 1000, ttft_p99_ms: float = 120.0, missed: int = 0, rate: float = 4.0) -> Record:
    return Record(count, missed, rate, 500.0, 100.0, ttft_p99_ms, None, 12.0)


def ruled(
    real: list[UserRequest], earlier: Record | None, *, left_s: float = 60.0, rate: float | None = 4.0
) -> tuple[ProbationVerdict, str]:
    ruling = judge(earlier, real, rate, SLO, RULE, left_s)
    return ruling.verdict, ruling.reason


def test_good_requests_go_on_and_pass() -> None:
    assert ruled(requests(1000), before())[0] is ProbationVerdict.GOES_ON
    verdict, reason = ruled(requests(1000), before(), left_s=0)
    assert (verdict, reason) == (
        ProbationVerdict.PASSED,
        "1000 requests, 0 of them missed the SLO; no worse than the incumbent was",
    )


@pytest.mark.parametrize("count", [0, 199])
def test_few_requests_say_nothing_however_bad_they_are(count: int) -> None:
    bad = requests(count, 9000.0)
    assert ruled(bad, before())[0] is ProbationVerdict.GOES_ON
    assert ruled(bad, before(), left_s=0) == (
        ProbationVerdict.PASSED,
        f"{count} requests in the probation were too few to judge by",
    )


def test_slo_burn() -> None:
    # 6 times the budget of 1%.
    assert ruled(requests(1000, slow=59, slow_ms=900.0), None)[0] is ProbationVerdict.GOES_ON
    verdict, reason = ruled(requests(1000, slow=60, slow_ms=900.0), None)
    assert (verdict, reason) == (
        ProbationVerdict.SLO_BURN,
        "60 of 1000 requests missed the SLO, 6.0 times the error budget",
    )


def test_no_burn_where_the_incumbent_missed_as_much_under_the_same_traffic() -> None:
    real = requests(1000, slow=100, slow_ms=900.0)
    assert ruled(real, before(ttft_p99_ms=1000.0, missed=100))[0] is ProbationVerdict.GOES_ON
    assert ruled(real, before(ttft_p99_ms=1000.0, missed=99))[0] is ProbationVerdict.SLO_BURN
    # Its record under another traffic excuses nothing.
    assert ruled(real, before(ttft_p99_ms=1000.0, missed=100, rate=1.0))[0] is ProbationVerdict.SLO_BURN


def test_a_regression_within_the_slo() -> None:
    # The incumbent's p99 of 120 ms and a quarter more is 150 ms.
    assert ruled(requests(1000, slow=40, slow_ms=149.0), before())[0] is ProbationVerdict.GOES_ON
    verdict, reason = ruled(requests(1000, slow=40, slow_ms=151.0), before())
    assert verdict is ProbationVerdict.REGRESSION
    assert "40 of 1000 requests had a TTFT above 150 ms" in reason
    # One in a hundred is what a p99 is.
    assert ruled(requests(1000, slow=10, slow_ms=400.0), before())[0] is ProbationVerdict.GOES_ON


@pytest.mark.parametrize(
    "earlier",
    [None, before(199), before(rate=9.0), Record(1000, 0, None, 500.0, 100.0, 120.0, None, 12.0)],
    ids=["none", "few requests", "another rate", "unknown rate"],
)
def test_no_regression_without_a_comparable_record(earlier: Record | None) -> None:
    real = requests(1000, slow=40, slow_ms=400.0)
    assert ruled(real, earlier)[0] is ProbationVerdict.GOES_ON
    assert "no comparable traffic" in ruled(real, earlier, left_s=0)[1]
    assert ruled(real, before(), rate=None)[0] is ProbationVerdict.GOES_ON


def test_longer_prompts_are_another_traffic() -> None:
    now = summarize([UserRequest(0.0, 1.0, 1.0, 1.0, 800, 100)], SLO, 4.0)
    assert not comparable(before(), now)


def test_the_incumbent_again_is_not_rolled_back() -> None:
    """A/A: 200 probations of 2000 requests, looked at after every 100 of them, with long-tailed latencies."""
    draw = random.Random(1)

    def real(count: int) -> list[UserRequest]:
        return [UserRequest(0.0, draw.lognormvariate(4.5, 0.3), 10.0, 900.0, 500, 100) for _ in range(count)]

    rolled_back = 0
    for _ in range(200):
        earlier, now = summarize(real(500), SLO, 4.0), real(2000)
        rolled_back += any(
            judge(earlier, now[:seen], 4.0, SLO, RULE, 60.0).rolls_back for seen in range(200, 2001, 100)
        )
    assert rolled_back <= 2


def test_what_is_half_slower_is_rolled_back() -> None:
    draw = random.Random(2)
    found = 0
    for _ in range(50):
        earlier = summarize(
            [UserRequest(0, draw.lognormvariate(4.5, 0.3), None, 900, 500, 100) for _ in range(500)], SLO, 4
        )
        now = [UserRequest(0, 1.5 * draw.lognormvariate(4.5, 0.3), None, 900, 500, 100) for _ in range(1000)]
        found += judge(earlier, now, 4.0, SLO, RULE, 60.0).verdict is ProbationVerdict.REGRESSION
    assert found >= 45


@pytest.mark.parametrize(
    ("times", "loops"),
    [([], False), ([990, 995], False), ([500, 990, 995], True), ([399, 990, 995], False), ([990, 995, 1001], False)],
)
def test_a_crash_loop(times: list[float], loops: bool) -> None:
    ruling = crash_loop(times, 1000.0, RULE)
    assert (ruling is not None) is loops
    if ruling is not None:
        assert ruling.rolls_back
        assert ruling.reason == "it crashed 3 times within 10 minutes"


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (UserRequest(0, 500.0, 50.0, 5000.0, 1, 1), False),
        (UserRequest(0, 500.1, 50.0, 5000.0, 1, 1), True),
        (UserRequest(0, None, None, 5000.0, 1, 1), False),
        (UserRequest(0, None, 51.0, 1.0, 1, 1), True),
        (UserRequest(0, 1.0, 1.0, 5001.0, 1, 1), True),
        (UserRequest(0, 1.0, 1.0, 1.0, 1, 1, failed=True), True),
    ],
)
def test_a_miss(request_: UserRequest, expected: bool) -> None:
    assert missed_slo(request_, SLO) is expected


def test_the_binomial_tail() -> None:
    assert binomial_tail(0, 10, 0.5) == 1.0
    assert binomial_tail(10, 10, 0.5) == pytest.approx(0.5**10)
    assert binomial_tail(1, 100, 0.01) == pytest.approx(1 - 0.99**100)
    assert binomial_tail(400, 10_000, 0.01) == pytest.approx(0.0, abs=1e-9)
