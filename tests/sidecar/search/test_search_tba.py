"""Thermal Budget Annealing, by its published numbers (arXiv 2604.17627)."""

import math
from dataclasses import replace

import numpy as np
import pytest
from search_cases import ONE_CHOICE, ONE_SWITCH, SPACE, crashed, feasible, infeasible, refused

from sidecar.search.contract import Observation
from sidecar.search.failed_configs import Blacklist
from sidecar.search.paper_constants import PUBLISHED
from sidecar.search.tba import Annealing, AnnealingState, accepts, fold
from vllm_sloguard.knobs import KnobValues

HERE: KnobValues = {"max_num_seqs": 16, "enforce_eager": False, "block_size": 16}
THERE: KnobValues = {"max_num_seqs": 32, "enforce_eager": True, "block_size": 16}


def temperature(*history: Observation) -> float:
    return fold(history, seed=0).temperature


def test_the_incumbent_is_the_first_of_three_random_trials() -> None:
    search, history = Annealing(SPACE, seed=0, trials=10), [feasible(HERE, 1.0)]
    reasons: list[str] = []
    for value in (2.0, 3.0, 4.0):
        proposal = search.ask(history)
        reasons.append(proposal.reason)
        history.append(feasible(proposal.config, value))
    assert reasons[:2] == ["random start, 2 of 3", "random start, 3 of 3"]
    assert reasons[2].startswith("T=0.70, changed ")


def test_what_was_refused_is_not_one_of_the_three() -> None:
    history = [feasible(HERE, 1.0), refused(THERE), refused(THERE)]
    assert Annealing(SPACE, 0, 10).ask(history).reason == "random start, 2 of 3"
    assert fold(history, 0).trials == 1


def test_it_cools_on_each_improvement() -> None:
    start = [infeasible(HERE, v) for v in (5.0, 4.0, 3.0)]
    assert temperature(*start) == 1.0
    assert temperature(*start, infeasible(HERE, 2.0)) == pytest.approx(0.95)
    assert temperature(*start, infeasible(HERE, 2.0), infeasible(HERE, 1.0)) == pytest.approx(0.95**2)
    found = [*start, infeasible(HERE, 2.0), feasible(HERE, 1.0)]
    assert temperature(*found) == pytest.approx(0.7)
    assert temperature(*found, feasible(HERE, 2.0)) == pytest.approx(0.7 * 0.92)
    assert temperature(*found, *(feasible(HERE, 2.0 + i) for i in range(200))) == PUBLISHED.temperature_floor


def test_it_reheats_after_four_trials_without_improvement() -> None:
    improving = [feasible(HERE, float(i)) for i in range(15)]  # 12 after the initial three
    cold = 0.7 * 0.92**12
    assert temperature(*improving) == pytest.approx(cold)
    assert temperature(*improving, *[crashed(THERE)] * 3) == pytest.approx(cold)
    assert temperature(*improving, *[crashed(THERE)] * 4) == pytest.approx(cold * 2.5)
    assert temperature(*improving, *[crashed(THERE)] * 8) == pytest.approx(0.8)
    assert fold([*improving, *[crashed(THERE)] * 8], 0).reheats == 2
    assert temperature(*improving, *[refused(THERE)] * 8) == pytest.approx(cold)


def test_a_reheat_does_not_cool() -> None:
    assert temperature(*[crashed(HERE)] * 7) == 1.0


def test_a_crash_is_a_large_finite_violation() -> None:
    state = fold([crashed(HERE)], 0)
    assert (state.energy, state.current) == (100.0, HERE)
    assert fold([crashed(HERE), infeasible(THERE, 3.0)], 0).current == THERE
    assert fold([crashed(HERE), infeasible(THERE, 3.0), *[crashed(HERE)] * 20], 0).current == THERE


def test_once_something_is_feasible_nothing_else_is_moved_to() -> None:
    history = [crashed(HERE), feasible(HERE, 1.0), *[infeasible(THERE, 1e-9)] * 20]
    assert fold(history, 0).current == HERE


def test_a_fall_is_accepted_and_a_rise_by_its_probability() -> None:
    rng = np.random.default_rng(0)
    hot = AnnealingState(temperature=1.0)
    assert accepts(0.0, hot, rng)
    assert accepts(-1.0, hot, rng)
    assert not accepts(math.inf, hot, rng)
    # exp(-0.1 / (1.0 * 0.1)) of the time; the scale of a violation is 0.1.
    taken = sum(accepts(0.1, hot, rng) for _ in range(5000)) / 5000
    assert taken == pytest.approx(math.exp(-1), abs=0.03)
    assert not any(accepts(0.1, replace(hot, temperature=0.001), rng) for _ in range(100))
    # Of the objective it is the range among feasible trials: here 8.
    ranged = AnnealingState(temperature=0.5, feasible=True, best=-10.0, worst_feasible=-2.0)
    taken = sum(accepts(4.0, ranged, rng) for _ in range(5000)) / 5000
    assert taken == pytest.approx(math.exp(-1), abs=0.03)


def test_structural_changes_grow_rarer_over_the_phase() -> None:
    search = Annealing(SPACE, 0, trials=10)
    assert [search.structural(trials) for trials in (0, 5, 10, 30)] == [0.5, 0.375, 0.25, 0.25]


def test_a_value_is_banned_after_three_failures_in_a_row_for_eight_trials() -> None:
    eager: KnobValues = {"enforce_eager": True}
    fine = feasible({"enforce_eager": False}, 1.0)
    bad = [crashed(eager), refused(eager), crashed(eager)]

    def permits(history: list[Observation]) -> bool:
        return Blacklist.of(SPACE, history).permits({}, "enforce_eager", True)

    assert permits(bad[:2])
    assert not permits(bad)
    assert not permits([bad[0], fine, *bad[1:]])  # other values do not end a streak
    assert permits([bad[0], infeasible(eager, 1.0), *bad[1:]])  # one that ran does
    assert not permits([*bad, *[fine] * 7])
    assert permits([*bad, *[fine] * 8])
    assert Blacklist.of(SPACE, bad).permits({}, "enforce_eager", False)


def test_a_pair_is_banned_where_its_halves_are_not() -> None:
    def of(eager: bool, block: int) -> KnobValues:
        return {"enforce_eager": eager, "block_size": block}

    history = [
        o for _ in range(3) for o in (crashed(of(True, 64)), feasible(of(True, 16), 1), feasible(of(False, 64), 1))
    ]
    blacklist = Blacklist.of(SPACE, history)
    assert not blacklist.permits(of(True, 16), "block_size", 64)
    assert not blacklist.permits(of(False, 64), "enforce_eager", True)
    assert blacklist.permits(of(True, 16), "block_size", 32)
    assert blacklist.permits(of(False, 16), "block_size", 64)


def test_a_proposal_does_not_change_to_a_banned_value() -> None:
    history = [feasible(HERE, 1.0), feasible(HERE, 2.0), *[crashed({"block_size": 64})] * 3]
    blocks = {Annealing(SPACE, seed, 10).ask(history).config["block_size"] for seed in range(60)}
    assert blocks == {16, 32}


def test_a_dead_end_among_failures_is_left_at_random() -> None:
    on, off = ({"enforce_eager": eager} for eager in (True, False))
    proposal = Annealing(ONE_SWITCH, 0, 10).ask([*[feasible(on, 1.0)] * 3, crashed(off)])
    assert proposal.config == on
    assert proposal.reason == "T=0.70, random, since all neighbours have failed"


def test_a_space_of_one_point_proposes_it() -> None:
    history = [feasible({}, 1.0)] * 4
    proposal = Annealing(ONE_CHOICE, 0, 10).ask(history)
    assert proposal.config == {"kv_cache_dtype": "auto"}
    assert proposal.reason.endswith("changed nothing")
