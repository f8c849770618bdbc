"""Which configuration came nearest to the SLO, and what stands in its way."""

from dataclasses import replace

from sidecar_cases import measured, planned, served, trial

from sidecar.config.slo import Slo
from sidecar.promote.nearest_miss import NearestMiss, nearest_miss
from sidecar.record.trial import Result, Role

SLO = Slo(ttft_p99_ms=500)


def load(ttft_p99_ms: float) -> Result:
    violation = max(ttft_p99_ms / 500 - 1, 0.0) / 2
    return replace(served(-900.0, violation=violation), measurement=measured(ttft_p99_ms))


def test_the_smallest_violation_and_its_limit_are_named() -> None:
    trials = [
        trial(1, planned(Role.BASELINE), load(1000)),
        trial(2, planned(), load(600)),
        trial(3, planned(), load(5000)),
    ]

    miss = nearest_miss(trials, SLO)

    assert isinstance(miss, NearestMiss)
    assert (miss.trial, miss.limit, round(miss.excess, 6), miss.highest_rate) == (2, "ttft_p99_ms", 0.2, None)
    assert str(miss) == "trial 2 came nearest and exceeds ttft_p99_ms by 20%"


def test_nothing_is_a_near_miss_once_the_slo_was_met() -> None:
    assert nearest_miss([trial(1, planned(Role.BASELINE), load(100))], SLO) is None
    assert nearest_miss([], SLO) is None
