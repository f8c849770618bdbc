"""The breakdown of a run's time: every second is counted exactly once."""

import pytest
from sidecar_cases import oom, planned

from sidecar.cli.terminal import spending
from sidecar.record.time_breakdown import TimeBreakdown, spent
from sidecar.record.trial import Result, Trial


def trial(number: int, began: float, took: float | None, result: Result | None, refusal: str = "") -> Trial:
    ended = None if took is None else began + took
    return Trial(1, number, planned(refusal=refusal), began, ended, result)


def test_each_second_is_counted_once() -> None:
    good = Result(violation=0.0, value=-1.0, start_s=20, warmup_s=3, load_s=30, stop_s=4)
    trials = [
        trial(1, 100, 57.5, good),
        trial(2, 160, 0, None, refusal="too large"),
        trial(3, 162, 12, Result(crash=oom(), stop_s=2)),  # never came up
        trial(4, 180, 25, Result(crash=oom(), start_s=15, stop_s=1)),  # under load
        trial(5, 210, 8, None),  # aborted
    ]

    found = spent(trials, now=220)

    assert found == TimeBreakdown(4, 20 + 10 + 15, 3, 30 + 9 + 8, 4 + 2 + 1, deciding=18)
    assert found.total == 120
    assert spending(found) == (
        "4 trials in 120 s: starting 45 s (38%), warm-up 3 s (2%), measuring 47 s (39%), stopping 7 s (6%), "
        "deciding 18 s (15%)"
    )


def test_a_run_without_trials_took_no_time() -> None:
    assert spent([], now=5.0) == TimeBreakdown(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert spending(spent([], now=5.0)).startswith("0 trials in 0 s")


def test_a_journal_from_before_the_parts_were_told_apart() -> None:
    old = trial(1, 0, 60, Result(violation=1.0, start_s=20, load_s=35, stop_s=4))

    assert spent([old], now=60).measuring == pytest.approx(35)
