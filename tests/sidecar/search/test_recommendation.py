"""The configuration to validate: one that meets the SLO again, not the luckiest one."""

from dataclasses import replace

from search_cases import INCUMBENT, SPACE, feasible, with_margins

from sidecar.search.contract import Observation
from sidecar.search.recommendation import luckiest, recommended


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
