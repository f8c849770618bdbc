"""The error rates that the sequential test and the trend promise, over many simulated loads with continuous looks."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from sidecar.config.slo import Slo
from sidecar.measure import saturation, sequential_test
from sidecar.measure.partial_load import Arrival, EarlyStop
from sidecar.measure.requests import End, Ending

SLO = Slo(ttft_p99_ms=100)
CONFIDENCE = 0.9  # so that the promised errors are frequent enough to be counted
MOST = 3000


def answered(over: float, itls_s: tuple[float, ...] = ()) -> Arrival:
    return Arrival(0.0, 0.2 if over else 0.05, 0.3, itls_s, begun=True, ended=True, failed=False)


def outcome(misses: np.ndarray) -> str:
    """The end of a load that is analysed after each request, with the rule's own likelihood ratio."""
    steps = np.where(misses, sequential_test.log_ratio([1.0], 0.01), sequential_test.log_ratio([0.0], 0.01))
    ratios, bound = np.cumsum(steps), -math.log(1 - CONFIDENCE)
    over, under = (int(np.argmax(hit)) if hit.any() else MOST for hit in (ratios >= bound, ratios <= -bound))
    return "open" if over == under else "missed" if over < under else "enough"


@pytest.mark.parametrize(("share", "wrong"), [(0.005, "missed"), (0.002, "missed"), (0.02, "enough"), (0.03, "enough")])
def test_error_rates_hold_under_continuous_monitoring(share: float, wrong: str) -> None:
    rng = np.random.default_rng(7)
    loads = 2000
    errors = sum(outcome(rng.random(MOST) < share) == wrong for _ in range(loads))

    # 10 % is promised; allow three standard deviations at this number of loads.
    assert errors / loads <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / loads)


@pytest.mark.parametrize(
    ("misses", "count", "how"), [(0, 257, None), (0, 258, End.ENOUGH), (2, 2, None), (3, 3, End.STOP)]
)
def test_sample_sizes_at_which_a_load_ends(misses: int, count: int, how: End | None) -> None:
    sent = [*[answered(1.0)] * misses, *[answered(0.0)] * (count - misses)]
    ending = sequential_test.sequential_ending(sent, 10.0, Slo(ttft_p99_ms=100, error_rate=0.0), 0.98)

    assert (ending.how if ending is not None else None) == how


def test_requests_behind_an_unfinished_one_do_not_count_yet() -> None:
    waiting = Arrival(0.0, 0.02, 0.02, (), begun=False, ended=False, failed=False)
    rest = [answered(0.0)] * 300

    assert sequential_test.sequential_ending([waiting, *rest], 10.0, SLO, 0.98) is None
    assert sequential_test.sequential_ending([*rest, waiting], 10.0, SLO, 0.98) is not None


def test_shares_of_slow_tokens_are_tested_as_shares() -> None:
    slo = Slo(itl_p99_ms=100)
    one_slow_in_50 = (0.2, *(0.01,) * 49)
    few = [answered(0.0)] + [answered(0.0, (0.01,) * 50)] * 260
    many = [answered(0.0, one_slow_in_50)] * 400

    assert _how(sequential_test.sequential_ending(few, 10.0, slo, 0.98)) == End.ENOUGH
    ending = sequential_test.sequential_ending([*many, *many], 10.0, slo, 0.98)
    assert isinstance(ending, EarlyStop)
    assert "itl_p99_ms" in ending.why
    assert ending.bounds.itl_p99_ms == pytest.approx(200)


def _how(ending: Ending | None) -> End | None:
    return None if ending is None else ending.how


def served(rate: float, service_s: float, count: int, seed: int) -> list[Arrival]:
    """A queue with one server: Poisson arrivals, exponential service."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum(rng.exponential(1 / rate, count))
    free, found = 0.0, list[Arrival]()
    for start, service in zip(starts.tolist(), rng.exponential(service_s, count).tolist(), strict=True):
        free = max(free, start) + service
        found.append(Arrival(start, free - start, free - start, (), True, True, False))
    return found


def stops(load: list[Arrival], rate: float, slo: Slo) -> float | None:
    """The share of ``load``'s duration after which the trend ends it, analysed four times a second."""
    end_s = load[-1].start_s
    for now_s in np.arange(0.25, end_s, 0.25).tolist():
        sent = [a for a in load if a.start_s <= now_s]
        seen = [
            a if a.start_s + a.ttft_s <= now_s else Arrival(a.start_s, now_s - a.start_s, 0.0, (), False, False, False)
            for a in sent
        ]
        if saturation.saturation_ending(seen, now_s, len(load), rate, slo) is not None:
            return now_s / (end_s + load[-1].ttft_s)
    return None


def test_a_stable_queue_is_never_called_over_saturated() -> None:
    slo = Slo(ttft_p99_ms=4000)
    good = [load for seed in range(40) if _p99_ms(load := served(8, 0.1, 300, seed)) <= 4000]

    assert len(good) > 30
    assert [stops(load, 8, slo) for load in good] == [None] * len(good)


def test_a_growing_queue_is_called_over_saturated() -> None:
    slo = Slo(ttft_p99_ms=4000)
    bad = [served(20, 0.1, 400, seed) for seed in range(10)]

    assert all(_p99_ms(load) > 4000 for load in bad)
    shares = [stops(load, 20, slo) for load in bad]
    assert all(share is not None and share < 0.5 for share in shares)


def _p99_ms(load: list[Arrival]) -> float:
    return float(np.percentile([a.ttft_s for a in load], 99)) * 1000


# Limits on statistics other than a p99, and how a request exceeds them.
SLOW = replace(answered(1.0, (0.2,) * 10), e2e_s=0.9)
FAST = answered(0.0, (0.01,) * 10)
OTHERS = [
    *[Slo.model_validate({f"{kind}_p{share}_ms": 100}) for kind in ("ttft", "tpot", "itl") for share in (50, 90, 95)],
    *[Slo.model_validate({f"e2e_p{share}_ms": 500}) for share in (50, 90, 95)],
    Slo(ttft_p99_ms=9000, itl_p50_ms=100, goodput=0.9),
    Slo(ttft_p50_ms=9000, itl_p50_ms=100, goodput=0.95, error_rate=0.0),
]


def ends(slo: Slo, share: float, loads: int) -> Counter[str]:
    """How loads of 600 requests end of which ``share`` exceed the limits, analysed every 5 requests."""
    rng, found = np.random.default_rng(11), Counter[str]()
    for _ in range(loads):
        sent = [SLOW if slow else FAST for slow in (rng.random(600) < share).tolist()]
        endings = (sequential_test.sequential_ending(sent[:n], 10.0, slo, CONFIDENCE) for n in range(30, 600, 15))
        found[str(next((e.how for e in endings if e is not None), None))] += 1
    return found


@pytest.mark.parametrize("slo", OTHERS, ids=lambda slo: ", ".join(slo.model_dump(exclude_none=True)))
def test_other_limits_are_tested_against_what_each_of_them_allows(slo: Slo) -> None:
    """By the rule for p99s, 1% over a p50 was called missed, and an untested limit met."""
    allowed = slo.allowed_misses
    loads = 12
    met = ends(slo, allowed / 2, loads)
    missed = ends(slo, min(2 * allowed, (1 + allowed) / 2), loads)

    # 10 % is promised; five of twelve are one in 2000.
    assert met[str(End.STOP)] < 5
    assert missed[str(End.ENOUGH)] < 5
    assert ends(slo, 0.0, 1) == {str(End.ENOUGH): 1}
    assert ends(slo, 1.0, 1) == {str(End.STOP): 1}


def test_a_limit_on_a_mean_keeps_a_load_from_ending_as_sufficient() -> None:
    good = [answered(0.0)] * 600

    assert _how(sequential_test.sequential_ending(good, 10.0, Slo(ttft_p99_ms=100), 0.98)) is End.ENOUGH
    assert sequential_test.sequential_ending(good, 10.0, Slo(ttft_p99_ms=100, e2e_mean_ms=9000), 0.98) is None
