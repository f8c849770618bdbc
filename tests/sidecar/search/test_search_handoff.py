"""When annealing hands over to TPE."""

import pytest
from search_cases import ONE_INT, SPACE, crashed, feasible, infeasible, refused

from sidecar.search.contract import Observation
from sidecar.search.tba_tpe import TbaTpe, forced_after, handed_off
from sidecar.search.tpe import Tpe
from vllm_sloguard.knobs import KnobValues

HERE: KnobValues = {"max_num_seqs": 16, "enforce_eager": False, "block_size": 16}
MAKERS = {
    "f": lambda: feasible(HERE, 1.0),
    "i": lambda: infeasible(HERE, 0.5),
    "c": lambda: crashed(HERE),
    "r": lambda: refused(HERE),
}


def history_of(letters: str) -> list[Observation]:
    return [MAKERS[letter]() for letter in letters]


@pytest.mark.parametrize(("budget", "trials"), [(1, 5), (5, 5), (12, 5), (13, 5), (15, 6), (40, 16), (100, 40)])
def test_it_is_forced_at_two_fifths_and_five_trials_at_least(budget: int, trials: int) -> None:
    assert forced_after(budget) == trials
    assert not handed_off(history_of("f" * (trials - 1)), budget)
    assert handed_off(history_of("f" * trials), budget)


@pytest.mark.parametrize(
    ("letters", "budget", "early"),
    [
        ("ffc", 15, True),
        ("ffi", 15, True),
        ("fff", 15, False),  # no failure yet
        ("fcc", 15, False),  # one feasible of two
        ("fc", 10, False),  # two trials of three
        ("ffr", 15, False),  # a refused configuration never ran
        ("ffrr", 15, False),
        ("ffrc", 15, True),
        ("ffffffffffiiiiii", 60, True),
        ("fffffffffiiiiiii", 60, False),  # nine feasible of ten
        ("ffffffffffiiiii", 60, False),  # five bad of six
    ],
)
def test_it_comes_earlier_when_enough_of_both_was_seen(letters: str, budget: int, early: bool) -> None:
    assert handed_off(history_of(letters), budget) is early


def test_there_is_no_way_back() -> None:
    letters = "frcfcriffccr" * 3
    states = [handed_off(history_of(letters[:n]), 15) for n in range(len(letters) + 1)]
    assert states == sorted(states)
    assert states[0] is False
    assert states[-1] is True


def test_the_phase_and_the_reason_say_who_proposed() -> None:
    search = TbaTpe(SPACE, seed=0, budget=15)
    before, after = search.ask(history_of("ff")), search.ask(history_of("ffc"))
    assert (before.phase, before.reason) == ("tba-explore", "random start, 3 of 3")
    assert (after.phase, after.reason) == ("tpe-exploit", "expected improvement over 3 trials")


def test_tpe_steps_aside_where_its_point_has_failed() -> None:
    def at(seqs: int) -> KnobValues:
        return {"max_num_seqs": seqs}

    # The best value was measured where it crashed the second time.
    others = [observation for _ in range(4) for observation in (feasible(at(1), 1.0), infeasible(at(3), 1.0))]
    history = [feasible(at(2), 9.0), *others, crashed(at(2))]
    proposals = [Tpe(ONE_INT, seed, startup=0).ask(history) for seed in range(40)]
    assert {proposal.config["max_num_seqs"] for proposal in proposals} == {1, 3}
    stepped_aside = "changed max_num_seqs, the point of expected improvement has failed"
    assert stepped_aside in {proposal.reason for proposal in proposals}


def test_tpe_starts_at_random_when_cold() -> None:
    search = Tpe(SPACE, seed=0)
    assert search.ask(history_of("ffcrrrrrrrr")).reason == "random start, 4 of 10"
    assert search.ask(history_of("ffcffcffcf")).reason == "expected improvement over 10 trials"


def test_tpe_does_not_learn_from_failures_alone() -> None:
    proposal = TbaTpe(SPACE, seed=0, budget=15).ask(history_of("cccrccc"))
    assert (proposal.phase, proposal.reason) == ("tpe-exploit", "random, no trial has run yet")
