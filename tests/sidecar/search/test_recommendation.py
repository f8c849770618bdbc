"""The configuration to validate: one that meets the SLO again, not the luckiest one."""

import math
from dataclasses import replace

import pytest
from search_cases import INCUMBENT, SPACE, feasible, with_margins

from sidecar.search.contract import Context, Observation
from sidecar.search.recommendation import luckiest, may_repeat, raised_bar, recommended
from sidecar.search.sloguard import SloGuard


def at(seqs: int, value: float, margin: float) -> Observation:
    return with_margins(feasible({**INCUMBENT, "max_num_seqs": seqs}, value), ttft_p99_ms=margin)


HISTORY = [at(16, -105.0, -0.6), at(32, -102.0, -0.4), at(64, -100.0, -0.01)]


def test_the_edge_of_a_limit_is_left_to_the_luckiest() -> None:
    chosen = recommended(SPACE, HISTORY)

    assert chosen is not None
    assert chosen.index in (0, 1)
    assert chosen.worth_beating
    lucky = luckiest(SPACE, HISTORY)
    assert lucky is not None
    assert lucky.index == 2


def test_estimates_and_earlier_runs_are_not_recommended() -> None:
    stopped = replace(HISTORY[0], margin_sds={"ttft_p99_ms": 0.1}, value_sd=0.05)

    assert recommended(SPACE, [stopped, replace(HISTORY[1], prior=True)]) is None


def stopped(seen: Observation) -> Observation:
    return replace(seen, margin_sds={"ttft_p99_ms": 0.05}, value_sd=0.02)


def test_a_stopped_load_is_a_candidate_for_a_repeat_until_it_was_repeated() -> None:
    better = stopped(at(48, -80.0, -0.5))
    history = [HISTORY[0], better]

    found = recommended(SPACE, history, stopped=True)
    assert found is not None
    assert found.index == 1
    assert raised_bar(history, 0) == (pytest.approx(math.log(80 / 105)), 0.02)
    after = recommended(SPACE, [*history, replace(at(48, -82.0, -0.5))], stopped=True)
    assert after is not None
    assert after.index == 2
    assert raised_bar(history[:1], 0) == (0.0, 0.0)


def test_the_last_trials_are_never_stopped_for_being_better() -> None:
    assert [may_repeat(ran, 15) for ran in (0, 10, 11, 14)] == [True, True, False, False]
    assert not may_repeat(0, 3)


def test_the_best_is_measured_to_its_end_before_the_budget_is_over() -> None:
    better = stopped(at(48, -80.0, -0.5))
    optimizer = SloGuard(SPACE, 0, 6, Context(incumbent=INCUMBENT))

    asked = optimizer.ask([HISTORY[0], better, at(20, -104.0, -0.6), at(24, -103.0, -0.6)])

    assert (asked.phase, dict(asked.config)) == ("repeat", {**INCUMBENT, "max_num_seqs": 48})


def test_more_memory_than_the_incumbent_had_is_in_doubt_until_it_was_there_repeatedly() -> None:
    def with_share(share: float, value: float) -> Observation:
        return with_margins(feasible({**INCUMBENT, "gpu_memory_utilization": share}, value), ttft_p99_ms=-0.8)

    base = with_share(0.75, -100.0)
    once = recommended(SPACE, [base, with_share(0.85, -50.0)])
    often = recommended(SPACE, [base, *[with_share(0.85, -50.0)] * 4])

    assert once is not None
    assert often is not None
    assert once.probability < 0.9 < often.probability
