"""The rule by which a configuration replaces what is serving."""

import math

import pytest
from sidecar_cases import oom, planned, served, trial

from sidecar.config import Promotion
from sidecar.promotion import Outcome, baseline, candidate, decide
from sidecar.trial import Result, Role, Trial

RULE = Promotion(confidence=0.98, min_gain=0.05)
FAST = tuple(0.50 + i / 1000 for i in range(100))
SLOW = tuple(0.70 + i / 1000 for i in range(100))


def incumbent(result: Result | None = None, number: int = 1) -> Trial:
    return trial(number, planned(Role.BASELINE, max_num_seqs=2), result or served(-1000, SLOW))


def found(result: Result, number: int = 2) -> Trial:
    return trial(number, planned(Role.SEARCH, max_num_seqs=number), result)


def validated(result: Result | None, number: int = 9) -> Trial:
    return trial(number, planned(Role.VALIDATION, max_num_seqs=2), result)


def test_better_and_surely_so_is_promoted() -> None:
    decision = decide([incumbent(), found(served(-700, FAST)), validated(served(-800, FAST))], RULE)

    assert decision.outcome is Outcome.PROMOTED
    assert decision.trial == 9
    assert decision.gain == pytest.approx(0.2)  # of the second measurement, not of the lucky first
    assert decision.p_value is not None
    assert decision.p_value < 0.02


def test_nothing_that_ran_was_better() -> None:
    slower, missed = found(served(-1100), 2), found(served(-10, violation=0.5), 3)
    crashed = found(Result(crash=oom()), 4)

    decision = decide([incumbent(), slower, missed, crashed], RULE)

    assert (decision.outcome, decision.trial) == (Outcome.KEPT, 1)
    assert "none of 1 feasible" in decision.reason


def test_as_good_as_the_incumbent_is_no_candidate() -> None:
    assert candidate([incumbent(), found(served(-1000))]) is None


def test_no_trial_at_all_keeps_the_incumbent() -> None:
    assert decide([], RULE).outcome is Outcome.KEPT


def test_not_validated_is_not_promoted() -> None:
    decision = decide([incumbent(), found(served(-100, FAST))], RULE)

    assert (decision.outcome, decision.trial) == (Outcome.KEPT, 1)
    assert "no time was left to validate trial 2" in decision.reason


@pytest.mark.parametrize(
    ("result", "said"),
    [(Result(crash=oom()), "crashed"), (served(-100, FAST, violation=0.1), "infeasible"), (None, "aborted")],
)
def test_a_validation_that_fails_keeps_the_incumbent(result: Result | None, said: str) -> None:
    decision = decide([incumbent(), found(served(-100, FAST)), validated(result)], RULE)

    assert (decision.outcome, decision.trial) == (Outcome.KEPT, 1)
    assert f"trial 2 was {said} when it was validated (trial 9)" in decision.reason


def test_a_validation_that_was_aborted_and_repeated_counts_by_its_last() -> None:
    trials = [incumbent(), found(served(-100, FAST)), validated(None, 3), validated(served(-100, FAST), 4)]

    assert (decide(trials, RULE).outcome, decide(trials, RULE).trial) == (Outcome.PROMOTED, 4)


@pytest.mark.parametrize("result", [served(-1, violation=2.0), Result(crash=oom())])
def test_an_incumbent_that_fails_is_replaced_by_what_works_twice(result: Result) -> None:
    decision = decide([incumbent(result), found(served(-5000, SLOW)), validated(served(-5000, SLOW))], RULE)

    assert (decision.outcome, decision.trial) == (Outcome.PROMOTED, 9)
    assert f"the incumbent was {incumbent(result).status}" in decision.reason


def test_a_gain_below_the_least_keeps_the_incumbent() -> None:
    decision = decide([incumbent(), found(served(-700, FAST)), validated(served(-951, FAST))], RULE)

    assert decision.outcome is Outcome.KEPT
    assert decision.gain == pytest.approx(0.049)
    assert "not better by 5%" in decision.reason


def test_a_gain_that_may_be_luck_keeps_the_incumbent() -> None:
    # The mean is better, the requests are not: one outlier made the difference.
    decision = decide([incumbent(), found(served(-700, FAST)), validated(served(-800, SLOW))], RULE)

    assert decision.outcome is Outcome.KEPT
    assert decision.p_value == pytest.approx(0.5, abs=0.05)
    assert "not better at confidence 98%" in decision.reason


@pytest.mark.parametrize("scores", [(), (0.0,) * 50, (math.inf,) * 50])
def test_scores_that_tell_nothing_promote_nothing(scores: tuple[float, ...]) -> None:
    trials = [incumbent(served(-1000, scores)), found(served(-100, scores)), validated(served(-100, scores))]

    assert decide(trials, RULE).outcome is Outcome.KEPT


def test_the_best_of_several_is_the_candidate_and_unguarded_ones_are_none() -> None:
    unguarded = trial(2, planned(Role.UNGUARDED), served(-1))
    best = found(served(-600), 4)

    assert candidate([incumbent(), unguarded, found(served(-900), 3), best, found(served(-800), 5)]) == best


def test_an_incumbent_that_was_measured_again_after_an_interruption_counts() -> None:
    interrupted = trial(1, planned(Role.BASELINE, max_num_seqs=2), None)
    again = incumbent(served(-500, FAST), number=2)
    worse = found(served(-900, SLOW), 3)

    assert baseline([interrupted, again]) == again
    assert candidate([interrupted, again, worse]) is None
    decision = decide([interrupted, again, worse, validated(served(-900, SLOW))], RULE)
    assert (decision.outcome, decision.trial) == (Outcome.KEPT, 2)
