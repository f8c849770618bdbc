"""The study's statistics: by hand on an invented study, and on the published trials (arXiv 2604.17627)."""

import csv
import json
from collections import defaultdict
from pathlib import Path

import pytest

from sidecar.bench.published_study import (
    StudyComparison,
    StudyError,
    Summary,
    comparisons,
    consistency,
    read_runs,
    summary,
)

# The fields of the published trials that the statistics need: status and mean latency.
PUBLISHED = Path(__file__).parent / "published_study" / "trials.csv"
Line = dict[str, object]


def write(folder: Path, runs: dict[str, list[Line]]) -> Path:
    for name, lines in runs.items():
        (folder / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name / "results.jsonl").write_text(text, encoding="utf-8")
    return folder


def served(*latencies_ms: float) -> list[Line]:
    return [{"status": "feasible", "avg_latency_ms": ms, "trial": n} for n, ms in enumerate(latencies_ms, 1)]


def published(folder: Path, harness: str) -> Path:
    runs: dict[str, list[Line]] = defaultdict(list)
    with PUBLISHED.open(newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            if row["harness"] == harness:
                latency = float(row["mean_latency_ms"]) if row["mean_latency_ms"] else None
                line: Line = {"trial": int(row["trial"]), "status": row["status"], "avg_latency_ms": latency}
                runs[f"{row['optimizer']}_seed{row['seed']}"].append(line)
    return write(folder, runs)


MADE_UP: dict[str, list[Line]] = {
    "random_seed1": [*served(2000, 900, 1000), {"status": "crashed"}],
    "random_seed2": [*served(800, 700, 1500), {"status": "infeasible", "avg_latency_ms": 600}],
    "ours_seed1": served(500, 400, 600, 700),
    "ours_seed20": served(2000, 300, 500, 400),
}


def of(folder: Path) -> tuple[dict[str, Summary], dict[str, StudyComparison]]:
    runs = read_runs(folder)
    return {name: summary(name, found) for name, found in runs.items()}, {c.metric: c for c in comparisons(runs)}


def test_a_made_up_study(tmp_path: Path) -> None:
    summaries, tests = of(write(tmp_path, MADE_UP))

    random, ours = summaries["random"], summaries["ours"]
    assert (random.runs, random.trials, random.feasible, random.crashed) == (2, 8, 6, 1)
    # 1 and 3 fast trials (below a second, not at it; what missed the SLO may be fast); after the first: 0/2 and 2/3.
    assert random.fast is not None
    assert (random.fast.mean, random.fast.sd) == (2, pytest.approx(2**0.5))
    assert random.consistency is not None
    assert random.consistency.mean == pytest.approx(1 / 3)
    # The best is of feasible trials: 900 and 700.
    assert random.best_ms is not None
    assert (random.best_ms.mean, random.best_ms.sd) == (800, pytest.approx(200 / 2**0.5))
    assert ours.consistency is not None
    assert (ours.consistency.mean, ours.consistency.sd) == (1, 0)
    # With two against two, all better: one of six orders.
    assert tests["best_ms"].p_better == pytest.approx(1 / 6)
    assert tests["best_ms"].p_two_sided == pytest.approx(1 / 3)
    assert tests["best_ms"].tighter == pytest.approx(2)
    assert (tests["fast"].optimizer, tests["fast"].baseline) == ("ours", "random")
    assert tests["consistency"].tighter is None


def test_consistency_counts_trials_after_the_first_fast_one() -> None:
    assert consistency([False, True, True, False]) == 0.5
    assert consistency([False, True]) is None
    assert consistency([False, False]) is None


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("{", "not JSON"),
        ("[]", "an object was expected"),
        ('{"status": "fine", "avg_latency_ms": 1}', "status must be one of feasible, infeasible, crashed, got 'fine'"),
        ('{"status": "feasible"}', "a feasible trial must have avg_latency_ms"),
        ('{"status": "feasible", "avg_latency_ms": "1"}', "must be a positive number or null, got '1'"),
        ('{"status": "feasible", "avg_latency_ms": NaN}', "must be a positive number or null, got nan"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, wanted: str) -> None:
    path = write(tmp_path, MADE_UP) / "random_seed2" / "results.jsonl"
    path.write_text(json.dumps(served(5)[0]) + "\n" + line, encoding="utf-8")

    with pytest.raises(StudyError, match=r"results\.jsonl, line 2: ") as raised:
        read_runs(tmp_path)

    assert wanted in str(raised.value)


def test_a_folder_that_holds_no_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="there is no such folder"):
        read_runs(tmp_path / "absent")
    with pytest.raises(StudyError, match=r"holds no <optimizer>_seed<n>/results\.jsonl"):
        read_runs(tmp_path)
    write(tmp_path, {"random_seed1": served(5)})
    with pytest.raises(StudyError, match="holds runs of random alone"):
        read_runs(tmp_path)
    write(tmp_path, {"ours_seed1": []})
    with pytest.raises(StudyError, match=r"ours_seed1/results.jsonl: holds no trial"):
        read_runs(tmp_path)
    write(tmp_path, {"else": served(5)})
    with pytest.raises(StudyError, match="must be called <optimizer>_seed<n>"):
        read_runs(tmp_path)


def test_the_published_table_is_reproduced(tmp_path: Path) -> None:
    """Every figure to the digits that were printed (arXiv 2604.17627)."""
    summaries, tests = of(published(tmp_path, "concurrent"))

    def figures(optimizer: str) -> list[str]:
        s = summaries[optimizer]
        assert s.fast is not None
        assert s.consistency is not None
        assert s.best_ms is not None
        return [
            f"{s.fast.mean:.2f} ± {s.fast.sd:.2f}",
            f"{s.consistency.mean:.3f} ± {s.consistency.sd:.3f}",
            f"{s.best_ms.mean:.2f} ± {s.best_ms.sd:.2f}",
            f"{s.feasible}/{s.trials}, {s.crashed}",
        ]

    assert figures("random") == ["7.40 ± 2.51", "0.539 ± 0.224", "470.52 ± 10.00", "75/75, 0"]
    assert figures("tba-tpe") == ["10.20 ± 1.10", "0.876 ± 0.123", "465.69 ± 2.26", "75/75, 0"]
    assert f"{tests['fast'].p_better:.3f}" == "0.014"
    assert f"{tests['consistency'].p_better:.3f}" == "0.010"
    assert f"{tests['best_ms'].p_two_sided:.2f}" == "0.84"
    assert f"{tests['best_ms'].tighter:.1f}" == "4.4"


def test_the_published_sequential_harness_is_reproduced(tmp_path: Path) -> None:
    summaries, tests = of(published(tmp_path, "sequential"))

    found = [(s.fast.mean, s.fast.sd) for name in ("random", "tba-tpe") if (s := summaries[name]).fast is not None]
    assert [f"{mean:.2f} ± {sd:.2f}" for mean, sd in found] == ["7.40 ± 2.51", "10.60 ± 0.89"]
    assert f"{tests['fast'].p_better:.3f}" == "0.008"
    assert [(s.feasible, s.crashed) for s in summaries.values()] == [(75, 0)] * 2
