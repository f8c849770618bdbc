"""Which configuration came nearest to the SLO, and what stands in its way."""

import json
from dataclasses import replace

from sidecar_cases import measured, planned, served, trial

from sidecar.config.slo import Slo
from sidecar.measure.capacity_search import RateResult
from sidecar.promote.nearest_miss import nearest_miss
from sidecar.record.decisions import Decision, NearestMiss, Outcome, decision_as_json, read_decision
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


def test_the_rates_of_the_search_below_are_part_of_it() -> None:
    missed = [trial(1, planned(Role.BASELINE), load(1000))]

    def with_rates(*tried: RateResult) -> NearestMiss | None:
        lower = replace(served(0.0, violation=0.1), value=None, measurement=None, tried=tried)
        return nearest_miss([*missed, trial(2, planned(Role.LOWER_RATE), lower)], SLO)

    met, never = (
        with_rates(RateResult(4.0, True), RateResult(5.6, False)),
        with_rates(RateResult(4.0, False), RateResult(2.0, False)),
    )
    assert met is not None
    assert (met.highest_rate, met.lowest_missed) == (4.0, 5.6)
    assert str(met).endswith("by 100%; it meets the SLO at 4 requests/s")
    assert never is not None
    assert (never.highest_rate, never.lowest_missed) == (None, 2.0)
    assert str(never).endswith("by 100%; it misses the SLO at 2 requests/s too")


def test_it_can_be_read_back_from_the_journal() -> None:
    miss = NearestMiss(4, "ttft_p99_ms", 0.25, estimated=True, highest_rate=3.5, lowest_missed=4.2)
    decision = Decision(Outcome.KEPT, "nothing met the SLO", 1, nearest_miss=miss)

    assert read_decision(json.dumps(decision_as_json(decision))) == decision
    assert read_decision('{"outcome": "kept", "reason": "as older versions wrote it"}').nearest_miss is None


def test_nothing_is_a_near_miss_once_the_slo_was_met() -> None:
    assert nearest_miss([trial(1, planned(Role.BASELINE), load(100))], SLO) is None
    assert nearest_miss([], SLO) is None
