"""A run in the terminal: plain lines without one, a row per finished trial and a footer with one."""

import io
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from report_cases import whole
from rich.console import Console
from sidecar_cases import configured, measured, oom, planned, served, trial

from sidecar.cli.run_footer import WindowStage
from sidecar.cli.terminal import RunDisplay, line, show_trials
from sidecar.cli.trial_rows import trial_columns, trial_row
from sidecar.measure.capacity_search import RateResult
from sidecar.record.decisions import Outcome
from sidecar.record.journal import Journal
from sidecar.record.run_snapshot import Setup, read_run, setup_of_config
from sidecar.record.states import State
from sidecar.record.trial import Plan, RepairChange, Result, Role, Trial
from sidecar.record.wording import capacity_text, misses_slo

REPAIRED = Plan(
    Role.SEARCH,
    {"max_num_seqs": 64, "gpu_memory_utilization": 0.91234},
    {"max_num_seqs": 8, "gpu_memory_utilization": 0.91234, "dtype": "auto"},
    "anneal",
    "",
    (RepairChange("max_num_seqs", 64, 8, "the KV cache holds no more"), RepairChange("block_size", None, 16, "CPU")),
)
HEAD = "trial 3 anneal: max_num_seqs=8"
P99S = "TTFT p99 10.0 ms, ITL p99 5.0 ms, E2E p99 120 ms"
STOPPED = Result(
    violation=0.7,
    measurement=replace(measured(340.0, e2e_mean_ms=None), itl_p99_ms=None),
    stopped="17 of 300 requests were over ttft_p99_ms 200, 3 are allowed",
)
FAILED = Result(violation=1, value=-70.0, measurement=measured(float("inf"), 9, None))


@pytest.fixture(name="setup")
def _setup(tmp_path: Path) -> Setup:
    return setup_of_config(configured(tmp_path))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (trial(3, planned(), None, None), f"{HEAD}: starting (because)"),
        (trial(3, planned(), None), f"{HEAD}: aborted; 30 s"),
        (trial(3, planned(), served(-80.0)), f"{HEAD}: feasible, mean E2E 80 ms, {P99S}; 30 s"),
        (
            trial(3, planned(), FAILED),
            f"{HEAD}: infeasible, mean E2E 70 ms, TTFT p99 failed, ITL p99 5.0 ms, E2E p99 120 ms; 30 s",
        ),
        (
            trial(3, planned(), STOPPED),
            f"{HEAD}: infeasible, no mean E2E, TTFT p99 ≥ 340 ms, E2E p99 ≥ 120 ms; 30 s; "
            "stopped: 17 of 300 requests were over ttft_p99_ms 200, 3 are allowed",
        ),
        (
            trial(3, planned(), Result(crash=oom())),
            f"{HEAD}: crashed; 30 s; out_of_memory while starting: torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (
            trial(3, planned(refusal="no memory for the model"), None),
            f"{HEAD}: refused; 30 s; no memory for the model",
        ),
        (trial(3, planned(Role.UNGUARDED), Result(violation=0.1)), f"{HEAD}: infeasible; 30 s; unguarded"),
        (
            trial(3, REPAIRED, Result(violation=0.1)),
            f"{HEAD} gpu_memory_utilization=0.9123: infeasible; 30 s; "
            "max_num_seqs 64 → 8: the KV cache holds no more; block_size not set → 16: CPU",
        ),
    ],
)
def test_a_trial_is_one_plain_line(case: Trial, expected: str, setup: Setup) -> None:
    assert line(case, setup) == expected


@pytest.mark.parametrize(
    ("objective", "result", "expected"),
    [
        ("goodput", served(4.25), "goodput 4.25 requests/s"),
        ("capacity", replace(served(16.0), tried=(RateResult(16, True),)), "capacity ≥ 16 requests/s"),
        ("capacity", replace(served(0.0), tried=(RateResult(8, False),)), "capacity below 8 requests/s"),
    ],
)
def test_the_line_has_the_figure_of_the_objective(
    objective: str, result: Result, expected: str, tmp_path: Path
) -> None:
    setup = setup_of_config(configured(tmp_path, "objective", objective))
    assert f": feasible, {expected}, TTFT p99" in line(trial(3, planned(), result), setup)


def test_without_a_terminal_each_event_is_one_plain_line(setup: Setup) -> None:
    output = io.StringIO()
    crashed = trial(3, planned(), Result(crash=oom("[rank0]: [/x] list[int] " + "long " * 60)))
    with RunDisplay(Console(file=output, width=40), setup, lambda: None) as display:
        display.notify(trial(3, planned(), None, None))
        display.notify(crashed)

    assert output.getvalue().splitlines() == [f"{HEAD}: starting (because)", line(crashed, setup)]


def on_terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=24, color_system=None)


def printed(console: Console) -> list[str]:
    """The lines in the order in which they were written, without escape sequences."""
    assert isinstance(console.file, io.StringIO)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue().replace("\r", "\n"))
    return [line.rstrip() for line in text.splitlines()]


def test_each_finished_trial_is_one_row_of_the_terminal_and_the_footer_goes_at_the_end(setup: Setup) -> None:
    console, stage = on_terminal(80), WindowStage(State.TUNING, 90.0)
    first, second = (trial(n, planned(max_num_seqs=8 * n), served(-80.0 / n)) for n in (1, 2))
    with RunDisplay(console, setup, lambda: stage) as display:
        for ended in (first, second):
            display.notify(replace(ended, ended_at=None, result=None))
            display.notify(ended)

    rows = [text for text in printed(console) if text.endswith("✓ meets SLO")]
    assert rows == [
        "  1 search       8  80.0 ms   10.0 ms  30 s ✓ meets SLO",
        "  2 search      16  40.0 ms   10.0 ms  30 s ✓ meets SLO",
    ]
    titles = [text for text in printed(console) if "took" in text]
    assert titles == ["  # what      seqs mean E2E  TTFT p99  took result"]


def test_the_header_is_repeated_where_the_width_has_changed(setup: Setup) -> None:
    console = on_terminal(50)
    with RunDisplay(console, setup, lambda: None) as display:
        display.notify(trial(1, planned(), served(-80.0)))
        console.width = 80
        display.notify(trial(2, planned(), served(-80.0)))
        display.notify(trial(3, planned(), served(-80.0)))

    titles = [text for text in printed(console) if text.startswith("  # what")]
    assert ["TTFT p99" in title for title in titles] == [False, True]


def test_the_footer_is_redrawn_while_a_window_is_open(setup: Setup) -> None:
    console = on_terminal(80)
    now = time.time()
    with RunDisplay(console, setup, lambda: WindowStage(State.TUNING, now, now + 600)) as display:
        display.notify(replace(trial(1, planned(), None, None), started_at=now))

    text = "\n".join(printed(console))
    assert re.search(r"phase +─+ search 0 of \d+ trials", text)
    assert "now     trial 1, search, for 0 s: seqs=8" in text
    assert "until the window ends at" in text


@pytest.mark.parametrize("evidence", ["[rank0]: out of memory", "list[int]", "no [/path] there", "[bold]a[/bold]"])
def test_the_table_shows_what_vllm_printed_verbatim(evidence: str, setup: Setup) -> None:
    console = on_terminal(300)
    cases = [trial(3, planned(), Result(crash=oom(evidence))), trial(4, planned(refusal=evidence), None)]

    show_trials(console, setup, cases)

    assert "\n".join(printed(console)).count(evidence) == 2


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("objective", ["latency", "goodput"])
def test_no_line_of_a_whole_run_is_wider_than_the_terminal(width: int, objective: str, tmp_path: Path) -> None:
    state = whole(tmp_path / "run", 14, objective=objective)
    trials, setup = Journal(state, read_only=True).trials(), read_run(state).setup
    console = on_terminal(width)

    show_trials(console, setup, trials)

    lines = printed(console)
    assert max(map(len, lines)) <= width
    numbered = [text for text in lines if re.match(r" +\d+ (incumbent|search|candidate) ", text)]
    assert len(numbered) == len(trials)
    assert all("…" not in text for text in numbered) or width > 80  # notes are cut, figures are not


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([(8, True), (16, True)], "≥ 16 requests/s"),
        ([(8, True), (16, False), (11, True)], "11 requests/s"),
        ([(8, False)], "below 8 requests/s"),
    ],
)
def test_a_capacity_at_the_highest_tested_rate_is_a_lower_bound(loads: list[tuple[float, bool]], expected: str) -> None:
    assert capacity_text(tuple(RateResult(rate, met) for rate, met in loads)) == expected


def test_an_incumbent_that_misses_the_slo_is_named_until_another_is_promoted() -> None:
    missed = trial(1, planned(Role.BASELINE), Result(violation=0.5))
    other = trial(2, planned(), served(-80.0))
    assert misses_slo([missed, other], None) == misses_slo([missed, other], Outcome.INCONCLUSIVE) == missed
    assert misses_slo([missed, other], Outcome.PROMOTED) is None
    assert misses_slo([other], None) is None


def test_a_trial_of_half_an_hour_fits_its_column(setup: Setup) -> None:
    short = trial(3, planned(), served(-80.0))
    row = trial_row(replace(short, ended_at=short.started_at + 1800), trial_columns(setup, {}, setup.knobs, 80))

    assert " 30 m " in row.plain
