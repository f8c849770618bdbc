"""The footer of a run in progress: phase, running trial, best trial, time left."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from sidecar_cases import configured, measured, planned, served, trial

from sidecar.cli.run_footer import LINES, WindowStage, best_line, footer, phase_progress
from sidecar.measure.capacity_search import RateResult
from sidecar.record.run_snapshot import Setup, setup_of_config
from sidecar.record.states import State
from sidecar.record.trial import Result, Role, Trial

NOW = 1_000.0
SEARCH = WindowStage(State.TUNING, 60.0, NOW + 600)
MISSED = Result(violation=0.5, value=-900.0, measurement=measured(1_000.0))


@pytest.fixture(name="setup")
def _setup(tmp_path: Path) -> Setup:
    setup = setup_of_config(configured(tmp_path, "search.budget", 10))
    return replace(setup, promotion=setup.promotion.model_copy(update={"pairs": [3, 5]}))


def searched(count: int) -> list[Trial]:
    baseline = trial(1, planned(Role.BASELINE), served(-200.0))
    return [baseline, *(trial(n, planned(max_num_seqs=n), served(-100.0 - n)) for n in range(2, count + 1))]


def validated(count: int) -> list[Trial]:
    roles = (Role.REFERENCE, Role.VALIDATION, Role.VALIDATION, Role.REFERENCE)
    values = {Role.REFERENCE: -200.0, Role.VALIDATION: -150.0}
    return [trial(11 + n, planned(role := roles[n % 4]), served(values[role])) for n in range(count)]


def lines(trials: list[Trial], setup: Setup, stage: WindowStage = SEARCH, width: int = 79) -> list[str]:
    return footer(trials, setup, stage, NOW, width).plain.splitlines()


def test_the_search_has_a_bar_and_the_time_left(setup: Setup) -> None:
    running = replace(trial(5, planned(max_num_seqs=64), None, None), started_at=NOW - 10)
    assert lines([*searched(4), running], setup) == [
        "phase   ━━━━─────── search 4 of 10 trials, about 2.8 min left (then validation)",
        "now     trial 5, search, for 10 s: seqs=64",
        "best    trial 2: mean E2E 102 ms; current 200 ms (-49%)",
        "left    10.0 min until the window ends at " + lines([], setup)[3].split(" at ")[1],
    ]


@pytest.mark.parametrize(("ran", "total"), [(0, 6), (5, 6), (6, 10), (9, 10), (10, 10), (13, 10)])
def test_validation_counts_its_own_starts_and_never_more_than_planned(ran: int, total: int, setup: Setup) -> None:
    stage = replace(SEARCH, state=State.VALIDATING)
    found = phase_progress([*searched(10), *validated(ran)], setup, stage, NOW)
    assert (found.name, found.done, found.total) == ("validation", min(ran, total), total)
    assert lines([*searched(10), *validated(ran)], setup, stage)[0].startswith("phase   ")


def test_validation_compares_the_re_measured_figures(setup: Setup) -> None:
    assert best_line([*searched(10), *validated(4)], setup) == (
        "candidate mean E2E 150 ms against 200 ms (-25%), re-measured"
    )


def test_a_current_configuration_that_misses_the_slo_is_named(setup: Setup) -> None:
    missing = trial(1, planned(Role.BASELINE), MISSED)
    assert best_line([missing], setup) == "no trial meets the SLO yet; current 900 ms, TTFT p99 2.0x"
    assert best_line([], setup) == "no trial meets the SLO yet; incumbent not measured yet"


def test_capacity_is_named_with_its_bound(setup: Setup, tmp_path: Path) -> None:
    setup = setup_of_config(configured(tmp_path, "objective", "capacity"))
    first = replace(served(8.0), tried=(RateResult(8, True), RateResult(16, False)))
    found = replace(served(32.0), tried=(RateResult(32, True),))
    trials = [trial(1, planned(Role.BASELINE), first), trial(2, planned(max_num_seqs=64), found)]
    assert best_line(trials, setup) == "trial 2: capacity ≥ 32 requests/s; current capacity 8 requests/s (+300%)"


@pytest.mark.parametrize(
    ("state", "phase", "now"),
    [
        (State.DRAINING, "drain: then search, validation and restore", "requests in flight finish, then vLLM stops"),
        (State.PROMOTING, "restore: then vLLM serves again", "vLLM starts with the promoted configuration"),
        (State.RESTORING, "restore: then vLLM serves again", "vLLM starts with the current configuration"),
    ],
)
def test_drain_and_restore_are_phases(state: State, phase: str, now: str, setup: Setup) -> None:
    assert [text[8:] for text in lines([], setup, replace(SEARCH, state=state))[:2]] == [phase, now]


def test_a_window_that_is_over_its_time_says_by_how_much(setup: Setup) -> None:
    late = replace(SEARCH, ends_at=NOW - 90)
    assert lines([], setup, late)[3] == "left    the window has overrun by 90 s; 15.7 min so far"
    without = replace(SEARCH, ends_at=None)
    assert lines([], setup, without)[3] == "left    no time limit; 15.7 min so far"


@pytest.mark.parametrize("width", [20, 40, 79, 139])
def test_it_is_four_lines_at_every_width(width: int, setup: Setup) -> None:
    found = lines([*searched(10), *validated(4)], setup, replace(SEARCH, state=State.VALIDATING), width)
    assert len(found) == LINES
    assert max(map(cell_len, found)) <= width
