"""`sloguard dev bench optimizers` and `sloguard dev study stats`, as commands."""

import json
import subprocess
from pathlib import Path

import pytest
from bench_cases import LISTED, write
from fake_service import sloguard

ROOT = Path(__file__).parents[3]


def bench(path: Path, *args: object) -> subprocess.CompletedProcess[str]:
    return sloguard("dev", "bench", "optimizers", "--landscape", path, *args)


def test_json_is_the_same_on_one_process_and_on_two(tmp_path: Path) -> None:
    path = write(tmp_path)
    args = ("--only", "slope", "--optimizers", "random,tba-tpe", "--seeds", 7, "--budget", 5, "--json")

    one, two = bench(path, *args, "--jobs", 1), bench(path, *args, "--jobs", 2)

    assert one.returncode == 0, one.stderr
    assert one.stdout == two.stdout
    rows = json.loads(one.stdout)
    assert [(r["landscape"], r["optimizer"], r["seeds"]) for r in rows] == [
        ("slope", n, 7) for n in ("random", "tba-tpe")
    ]
    assert all(set(LISTED) <= set(r) for r in rows)
    assert rows[0]["against"] == "tba-tpe"
    assert 0 <= rows[0]["p"] <= 1
    assert 0 < rows[0]["found"] <= 7


def test_a_run_that_ended_at_its_time_limit_is_resumed(tmp_path: Path) -> None:
    path, results = write(tmp_path), tmp_path / "runs.jsonl"
    args = ("--only", "slope", "--optimizers", "random", "--seeds", 12, "--budget", 3, "--jobs", 1)

    whole = bench(path, *args)
    first = bench(path, *args, "--results", results, "--time-limit", 0)
    assert (first.returncode, first.stdout) == (1, "")
    assert first.stderr == "time limit reached, 12 runs missing; the same command runs them\n"
    assert bench(path, *args, "--results", results).stdout == whole.stdout
    lines = results.read_text().splitlines(keepends=True)
    assert len(lines) == 12

    # A line that was cut off is run again; the others are not.
    results.write_text("".join(lines[:7]) + lines[7][:40])
    assert bench(path, *args, "--results", results).stdout == whole.stdout
    again = results.read_text().splitlines(keepends=True)
    assert again[:7] == lines[:7]
    assert sorted(again) == sorted(lines)


def test_a_results_file_that_is_something_else_is_one_line(tmp_path: Path) -> None:
    results = tmp_path / "runs.jsonl"
    results.write_text('{"run": 1}\n')

    ended = bench(write(tmp_path), "--optimizers", "random", "--seeds", 1, "--results", results)

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"sloguard: {results}, line 1: not a saved run\n"


def test_the_cost_of_early_stops_is_a_table_of_its_own(tmp_path: Path) -> None:
    names = ("early stops", "optimizers")
    table = tmp_path / "table.md"
    table.write_text("".join(f"<!-- bench {n}: begin -->\n<!-- bench {n}: end -->\n" for n in names))
    args = ("--optimizers", "sloguard", "--seeds", 1, "--budget", 3, "--jobs", 1, "--early-stop-cost")

    ended = bench(ROOT / "benchmarks/landscapes/paper.py", *args, "--into", table)

    assert ended.returncode == 0, ended.stderr
    assert "| sloguard, whole loads | 1/1 |" in ended.stdout
    early, _, optimizers = table.read_text().partition("<!-- bench early stops: end -->")
    assert "| paper | 1/1 | " in early
    assert "| sloguard, whole loads | 1/1 |" in optimizers


def test_the_table_names_every_optimizer(tmp_path: Path) -> None:
    ended = bench(write(tmp_path), "--optimizers", "random,tba", "--seeds", 1, "--budget", 2, "--jobs", 1)

    assert ended.returncode == 0, ended.stderr
    assert "### slope" in ended.stdout
    assert "| random | " in ended.stdout
    assert "| tba | " in ended.stdout


def test_an_ablation_is_compared_with_the_whole(tmp_path: Path) -> None:
    ended = bench(write(tmp_path), "--ablation", "--seeds", 1, "--budget", 2, "--jobs", 1, "--json")

    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout)
    assert rows[0]["optimizer"] == "sloguard"
    assert len(rows) > 3
    assert {r["against"] for r in rows[1:]} == {"sloguard"}


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--only", "hill"], "no landscape is called 'hill'"),
        (["--optimizers", "random,best"], "--optimizers: unknown optimizer 'best'; known are random,"),
        (["--optimizers", "random", "--early-stop-cost"], "--early-stop-cost: needs sloguard with early stops"),
        (["--against", "best"], "--against: 'best' is not among"),
        (
            ["--optimizers", "random", "--seeds", "1", "--budget", "1", "--into", "absent.md"],
            "absent.md: needs the lines",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, args: list[str], wanted: str) -> None:
    ended = bench(write(tmp_path), *args)

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert wanted in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_landscape_that_raises_is_one_line(tmp_path: Path, jobs: int) -> None:
    text = "class L:\n def space(s): return {'a': {'type': 'float', 'low': 0, 'high': 1}}\n"
    text += "".join(f" def {n}(s): return {{}}\n" for n in ("host", "slo", "incumbent"))
    path = write(tmp_path, text + " def evaluate(s, c, r): return c['b']\nLANDSCAPES = {'slope': L()}\n")

    ended = bench(path, "--optimizers", "random", "--seeds", 10, "--jobs", jobs)

    assert ended.returncode == 2
    assert ended.stderr.startswith("sloguard: slope: evaluate(")
    assert len(ended.stderr.splitlines()) == 1


def test_the_study_command(tmp_path: Path) -> None:
    line = '{{"status": "feasible", "avg_latency_ms": {}}}\n'
    for optimizer, latencies in (("random", (2000, 500, 2000)), ("other", (400, 450, 500))):
        for seed in (1, 2):
            folder = tmp_path / "study" / f"{optimizer}_seed{seed}"
            folder.mkdir(parents=True)
            (folder / "results.jsonl").write_text("".join(line.format(ms) for ms in latencies), encoding="utf-8")

    table, rows = (
        sloguard("dev", "study", "stats", tmp_path / "study"),
        sloguard("dev", "study", "stats", tmp_path / "study", "--json"),
    )

    assert "| fast trials | 3.00 ± 0.00 | 1.00 ± 0.00 |" in table.stdout
    assert json.loads(rows.stdout)["optimizers"][0]["optimizer"] == "other"


def test_a_study_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    ended = sloguard("dev", "study", "stats", tmp_path / "absent")

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"sloguard: {tmp_path}/absent: there is no such folder\n"
