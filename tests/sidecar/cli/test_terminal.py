"""A trial in one line: its configuration, its result and why."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from sidecar_cases import measured, oom, planned, served, trial

from sidecar.cli.terminal import View, line, trials_table
from sidecar.measure.capacity_search import RateResult
from sidecar.record.decisions import Outcome
from sidecar.record.trial import Plan, RepairChange, Result, Role, Trial
from sidecar.record.wording import capacity_text, misses_slo

KNOBS = ["max_num_seqs", "gpu_memory_utilization"]
REPAIRED = Plan(
    Role.SEARCH,
    {"max_num_seqs": 64, "gpu_memory_utilization": 0.91234},
    {"max_num_seqs": 8, "gpu_memory_utilization": 0.91234, "dtype": "auto"},
    "anneal",
    "",
    (RepairChange("max_num_seqs", 64, 8, "the KV cache holds no more"), RepairChange("block_size", None, 16, "CPU")),
)
HEAD = "trial 3 anneal: max_num_seqs=8"
STOPPED = Result(
    violation=0.7,
    measurement=replace(measured(340.0, e2e_mean_ms=None), itl_p99_ms=None),
    stopped="17 of 300 requests were over ttft_p99_ms 200, 3 are allowed",
)
FAILED = Result(violation=1, value=-70.0, measurement=measured(float("inf"), 9, None))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (trial(3, planned(), None, None), f"{HEAD}: starting (because)"),
        (trial(3, planned(), None), f"{HEAD}: aborted in 30 s"),
        (
            trial(3, planned(), served(-80.0)),
            f"{HEAD}: feasible ttft_p99=10.0 ms itl_p99=5.0 ms tpot_p99=- e2e_p99=120 ms e2e_mean=80.0 ms in 30 s",
        ),
        (
            trial(3, planned(), FAILED),
            f"{HEAD}: infeasible ttft_p99=failed itl_p99=5.0 ms tpot_p99=- e2e_p99=120 ms e2e_mean=- in 30 s",
        ),
        (
            trial(3, planned(), STOPPED),
            f"{HEAD}: infeasible ttft_p99=≥ 340 ms itl_p99=- tpot_p99=- e2e_p99=≥ 120 ms e2e_mean=- in 30 s "
            "stopped: 17 of 300 requests were over ttft_p99_ms 200, 3 are allowed",
        ),
        (
            trial(3, planned(), Result(crash=oom())),
            f"{HEAD}: crashed in 30 s out_of_memory while starting: torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (
            trial(3, planned(refusal="no memory for the model"), None),
            f"{HEAD}: refused in 30 s no memory for the model",
        ),
        (
            trial(3, planned(Role.UNGUARDED), Result(violation=0.1)),
            f"{HEAD}: infeasible in 30 s unguarded",
        ),
        (
            trial(3, REPAIRED, Result(violation=0.1)),
            f"{HEAD} gpu_memory_utilization=0.9123: infeasible in 30 s "
            "max_num_seqs 64 → 8: the KV cache holds no more; block_size not set → 16: CPU",
        ),
    ],
)
def test_line(case: Trial, said: str) -> None:
    assert line(case, KNOBS) == said


def test_without_a_terminal_each_event_is_one_plain_line() -> None:
    output = io.StringIO()
    crashed = trial(3, planned(), Result(crash=oom("[rank0]: [/x] list[int] " + "long " * 60)))
    with View(Console(file=output, width=40), KNOBS, 10) as view:
        view.notify(trial(3, planned(), None, None))
        view.notify(crashed)

    assert output.getvalue().splitlines() == [f"{HEAD}: starting (because)", line(crashed, KNOBS)]


@pytest.mark.parametrize("evidence", ["[rank0]: out of memory", "list[int]", "no [/path] there", "[bold]a[/bold]"])
def test_table_shows_what_vllm_said_as_it_said_it(evidence: str) -> None:
    output = io.StringIO()
    cases = [trial(3, planned(), Result(crash=oom(evidence))), trial(4, planned(refusal=evidence), None)]

    Console(file=output, width=300).print(trials_table(cases, KNOBS))

    assert output.getvalue().count(evidence) == 2


@pytest.mark.parametrize(
    ("loads", "said"),
    [
        ([(8, True), (16, True)], "≥ 16 requests/s"),
        ([(8, True), (16, False), (11, True)], "11 requests/s"),
        ([(8, False)], "below 8 requests/s"),
    ],
)
def test_a_capacity_at_the_highest_rate_tried_is_a_lower_bound(loads: list[tuple[float, bool]], said: str) -> None:
    tried = tuple(RateResult(rate, met) for rate, met in loads)
    assert capacity_text(tried) == said
    assert line(trial(3, planned(), Result(tried=tried)), KNOBS).endswith(f"capacity {said}")


def test_an_incumbent_that_misses_the_slo_is_named_until_another_is_promoted() -> None:
    missed = trial(1, planned(Role.BASELINE), Result(violation=0.5))
    other = trial(2, planned(), served(-80.0))
    assert misses_slo([missed, other], None) == misses_slo([missed, other], Outcome.INCONCLUSIVE) == missed
    assert misses_slo([missed, other], Outcome.PROMOTED) is None
    assert misses_slo([other], None) is None
