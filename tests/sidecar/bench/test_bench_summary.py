"""The arithmetic of a row, on handwritten runs."""

import dataclasses
import math
from pathlib import Path

import pytest
from bench_cases import LISTED

from sidecar.bench.landscape import LandscapeVerdict
from sidecar.bench.report import marks, put_into, rows_as_json, summary_markdown
from sidecar.bench.simulate import SimulatedRun, SimulatedTrial
from sidecar.bench.summary import best_known, mann_whitney, row
from sidecar.search.contract import ObservedStatus


def run(*latencies: float | None, name: str = "ours", seed: int = 0) -> SimulatedRun:
    """A run by its trials: a latency that met the SLO, a negative one that did not, None for a crash."""
    trials: list[SimulatedTrial] = []
    for ms in latencies:
        if ms is None:
            verdict = LandscapeVerdict(ObservedStatus.CRASHED, "oom", None, math.inf, None, 20)
        elif ms < 0:
            verdict = LandscapeVerdict(ObservedStatus.INFEASIBLE, "", -ms, 0.5, {}, 60)
        else:
            verdict = LandscapeVerdict(ObservedStatus.FEASIBLE, "", ms, 0, {}, 60)
        trials.append(SimulatedTrial({}, verdict, "phase", "why", 2.0))
    best = min(range(len(trials)), key=lambda n: trials[n].latency_ms)
    if math.isinf(trials[best].latency_ms):
        return SimulatedRun("here", name, seed, tuple(trials), 2, None, None)
    return SimulatedRun("here", name, seed, tuple(trials), 2, trials[best].latency_ms + 10, 1, best)


OURS = [run(None, 300, -100, 200), run(-900, None, None, None), run(400, 250, 800, 240)]


def test_a_row() -> None:
    made = row(OURS, 200, 350, [run(500, name="theirs"), run(None, name="theirs"), run(220, name="theirs")])

    assert (made.landscape, made.optimizer, made.seeds, made.found) == ("here", "ours", 3, 2)
    assert made.first_feasible_median == 1.5
    assert made.crashes_mean == pytest.approx(4 / 3)
    assert made.feasible_mean == 2
    assert made.refused_mean == 2
    assert made.best_median == 220
    assert made.best_std == pytest.approx(math.sqrt(800))
    assert made.regret == pytest.approx(0.1)
    assert (made.served_median, made.served_feasible) == (230, 1)
    # The median of 210, infinite and 250, against 200.
    assert made.regret_served == pytest.approx(0.25)
    assert made.cost_s_mean == pytest.approx((200 + 120 + 240) / 3)
    assert made.measured_s_mean == pytest.approx(2 * 12 / 3)
    # Only feasible trials are fast: 2 + 0 + 2; after the first fast one come (no, yes) and (no, yes).
    assert made.fast_mean == pytest.approx(4 / 3)
    assert made.consistency_mean == 0.5
    assert made.against == "theirs"
    # 200, inf, 240 against 500, inf, 220: won 3 + half of one of nine, and 1.
    assert made.a12 == pytest.approx((3 + 0.5 + 2) / 9)
    assert made.p is not None
    assert 0.5 < made.p <= 1


def test_runs_that_found_nothing() -> None:
    made = row([run(None, None), run(-700.0)], 200, None, [])

    assert (made.found, made.feasible_mean, made.crashes_mean) == (0, 0, 1)
    nothing = (made.first_feasible_median, made.best_median, made.best_std, made.regret, made.served_median)
    assert nothing == (None,) * 5
    assert (made.fast_mean, made.consistency_mean, made.against, made.p) == (None,) * 4
    assert "NaN" not in rows_as_json([made])
    assert "| ours | 0/2 | - |" in summary_markdown([made])


def test_the_best_known_is_the_landscapes_own_or_the_best_that_ran() -> None:
    assert best_known(OURS, 150.0) == 150
    assert best_known(OURS, None) == 200
    assert best_known([run(None)], None) is None


def test_the_comparison_is_scipys() -> None:
    lower = [float(n) for n in range(10)]

    p, a12 = mann_whitney(lower, [n + 100 for n in lower])
    assert (p, a12) == (pytest.approx(0.0001827, abs=1e-6), 1)
    assert mann_whitney(lower, lower) == (pytest.approx(1), 0.5)
    # Nothing was found on either side, so there is nothing to compare.
    assert mann_whitney([math.inf] * 5, [math.inf] * 5) == (1, 0.5)


def test_json_holds_what_was_asked_for() -> None:
    assert list(dataclasses.asdict(row(OURS, None, None, [])))[:4] == LISTED[:4]
    assert set(LISTED) <= set(dataclasses.asdict(row(OURS, None, None, [])))


def test_the_table_goes_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    begin, end = marks("optimizers")
    path.write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")

    put_into(path, "optimizers", "new")
    put_into(path, "optimizers", "newer")

    assert path.read_text(encoding="utf-8") == f"before\n{begin}\nnewer\n{end}\nafter\n"
    with pytest.raises(ValueError, match="needs the lines"):
        put_into(path, "ablation", "new")
    path.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="needs the lines"):
        put_into(path, "optimizers", "new")
    assert path.read_text(encoding="utf-8") == "no marks"
