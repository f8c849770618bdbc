"""A trial's status is derived from its record; the optimizer observes what actually ran."""

import math
from dataclasses import replace
from typing import Any

import pytest
from sidecar_cases import measured, oom, planned, served, trial

from sidecar.config.slo import Slo
from sidecar.measure.capacity_search import RateResult
from sidecar.measure.measurement import PercentileInterval
from sidecar.measure.steady_state import SteadyState
from sidecar.measure.verdict import least_violation
from sidecar.record.trial import Plan, RepairChange, Result, Role, Trial, TrialStatus
from sidecar.record.wording import why
from sidecar.search.contract import ObservedStatus

KNOBS = ("max_num_seqs", "block_size")
REPAIRED = Plan(
    Role.SEARCH,
    {"max_num_seqs": 64, "block_size": 16},
    {"max_num_seqs": 8, "block_size": 16, "dtype": "auto", "middleware": ["a"]},
    "anneal",
    "",
    (RepairChange("max_num_seqs", 64, 8, "memory"),),
)
REFUSED = planned(refusal="no memory for the model", max_num_seqs=64)


@pytest.mark.parametrize(
    ("case", "status"),
    [
        (trial(1, planned(), None, ended_at=None), TrialStatus.RUNNING),
        (trial(1, planned(), None), TrialStatus.ABORTED),
        (trial(1, planned(), Result(crash=oom())), TrialStatus.CRASHED),
        # Its load was measured before it crashed.
        (trial(1, planned(), Result(violation=0.0, value=-1.0, crash=oom())), TrialStatus.CRASHED),
        (trial(1, planned(), served(-1.0)), TrialStatus.FEASIBLE),
        (trial(1, planned(), served(-1.0, violation=0.01)), TrialStatus.INFEASIBLE),
        (trial(1, REFUSED, None), TrialStatus.REFUSED),
        # Killed between the two writes: it still never ran.
        (trial(1, REFUSED, None, ended_at=None), TrialStatus.REFUSED),
    ],
)
def test_status_follows_from_the_record(case: Trial, status: TrialStatus) -> None:
    assert case.status is status


def test_an_optimizer_is_told_what_ran_after_repair() -> None:
    told = trial(1, REPAIRED, served(-80.0)).observation(KNOBS)

    assert told is not None
    assert told.config == {"max_num_seqs": 8, "block_size": 16}
    assert (told.outcome, told.violation, told.value) == (ObservedStatus.FEASIBLE, 0.0, -80.0)


def test_an_optimizer_is_told_how_far_a_limit_was_missed() -> None:
    told = trial(1, REPAIRED, served(-80.0, violation=0.25)).observation(KNOBS)

    assert told is not None
    assert (told.outcome, told.violation, told.value) == (ObservedStatus.INFEASIBLE, 0.25, -80.0)


def test_of_a_load_that_was_stopped_an_optimizer_is_told_bounds_of_what_was_missed() -> None:
    slo = Slo(ttft_p99_ms=200, itl_p99_ms=50, e2e_p99_ms=2000)
    bounds = replace(measured(340.0, e2e_mean_ms=None), itl_p99_ms=None)
    stopped = Result(violation=least_violation(bounds, slo), measurement=bounds, stopped="17 of 300 requests ...")

    told = trial(1, planned(), stopped).observation(KNOBS, slo)

    assert told is not None
    assert told.outcome is ObservedStatus.INFEASIBLE
    assert told.value is None
    assert told.violation == pytest.approx(0.7 / 4)
    assert told.margins == {"ttft_p99_ms": pytest.approx(0.7)}  # the others are undetermined


def test_a_crash_is_infinitely_bad_even_when_a_load_was_measured() -> None:
    told = trial(1, REPAIRED, Result(value=-1.0, crash=oom())).observation(KNOBS)

    assert told is not None
    assert (told.outcome, told.violation, told.value) == (ObservedStatus.CRASHED, math.inf, None)
    assert told.config == {"max_num_seqs": 8, "block_size": 16}


def test_of_a_refusal_an_optimizer_is_told_what_it_asked_for() -> None:
    told = trial(1, REFUSED, None).observation(KNOBS)

    assert told is not None
    assert (told.outcome, told.violation, told.value) == (ObservedStatus.REFUSED, math.inf, None)
    assert told.config == {"max_num_seqs": 64}


@pytest.mark.parametrize("ended_at", [None, 5.0])
def test_of_what_did_not_end_an_optimizer_is_told_nothing(ended_at: float | None) -> None:
    assert trial(1, planned(), None, ended_at).observation(KNOBS) is None


@pytest.mark.parametrize(("met", "bound"), [((True, True), True), ((True, False), False), ((), False)])
def test_a_capacity_at_the_highest_rate_is_a_lower_bound(met: tuple[bool, ...], bound: bool) -> None:
    result = replace(served(32.0), tried=tuple(RateResult(16.0 * 2**number, m) for number, m in enumerate(met)))

    assert result.value_is_lower_bound is bound


def test_a_trial_without_a_measurement_tells_why() -> None:
    late = trial(1, planned(), Result(unmeasured="the load generator fell behind"))

    assert late.status is TrialStatus.ABORTED
    assert late.observation(KNOBS) is None
    assert why(late) == "not measured: the load generator fell behind"


def test_what_ran_includes_the_repairs_inside_the_engine() -> None:
    repaired = Result(repairs=(RepairChange("max_num_seqs", 8, 4, "memory"),))

    assert trial(1, planned(max_num_seqs=8), repaired).args_that_ran == {"max_num_seqs": 4}
    assert trial(1, REFUSED, None).args_that_ran == {"max_num_seqs": 64}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"steady": SteadyState.TOO_SHORT}, "too short to show a steady state"),
        ({"steady": SteadyState.GROWING}, "no steady state: requests arrived faster than they were answered"),
        (
            {"intervals": (PercentileInterval("ttft_p99_ms", 1.0, None, 80, 459),)},
            "ttft_p99_ms not resolved: n = 80, 459 needed",
        ),
    ],
)
def test_a_measurement_says_what_its_load_was_too_short_for(change: dict[str, Any], text: str) -> None:
    measurement = replace(measured(), **change)

    assert why(trial(1, planned(), Result(measurement=measurement))) == text
