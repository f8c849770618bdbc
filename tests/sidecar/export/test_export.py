"""Exported trials, read back by the tools they are for."""

import csv
import json
import math
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from fake_service import sloguard
from report_cases import INCUMBENT, Made, only_crashes, statuses, whole

from sidecar.export import optuna_study
from sidecar.export.optuna_study import METRICS
from sidecar.record.journal import Journal
from sidecar.record.run_snapshot import knobs_that_ran, read_run
from sidecar.record.trial import RESULT, Trial, TrialStatus
from vllm_sloguard.crash import Category

States = optuna.trial.TrialState


def exported(state: Path, *words: object) -> str:
    done = sloguard("export", state, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trials_of(state: Path) -> list[Trial]:
    return Journal(state, read_only=True).trials()


def study_of(file: Path, number: int = 1) -> optuna.Study:
    return optuna.load_study(study_name=f"sloguard run {number}", storage=f"sqlite:///{file}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(tmp_path_factory.mktemp("run"), 24)


def test_optuna_shows_nothing_as_best_that_missed_a_limit(run: Path, tmp_path: Path) -> None:
    exported(run, "--optuna", f"sqlite:///{tmp_path / 'trials.db'}")
    study, rows = study_of(tmp_path / "trials.db"), trials_of(run)
    feasible = [t for t in rows if t.status is TrialStatus.FEASIBLE]
    best = max(feasible, key=lambda t: t.result.value if t.result and t.result.value else -math.inf)
    # optuna-dashboard uses the storage, which ignores constraints.
    by_storage = study._storage.get_best_trial(study._study_id)  # pyright: ignore[reportPrivateUsage]

    assert study.best_trial.user_attrs["trial"] == best.number
    assert by_storage.number == study.best_trial.number
    assert best.result is not None
    assert best.result.value is not None
    assert study.best_value == pytest.approx(-best.result.value)
    assert study.user_attrs["objective"] == "e2e_mean_ms"


def test_optuna_has_every_trial_as_it_ran(run: Path, tmp_path: Path) -> None:
    exported(run, "--optuna", f"sqlite:///{tmp_path / 'trials.db'}")
    study, rows = study_of(tmp_path / "trials.db"), trials_of(run)
    state = {TrialStatus.FEASIBLE: States.COMPLETE, TrialStatus.INFEASIBLE: States.PRUNED}

    assert [t.user_attrs["trial"] for t in study.trials] == [t.number for t in rows]
    for theirs, ours in zip(study.trials, rows, strict=True):
        assert theirs.state is state.get(ours.status, States.FAIL)
        # Met, as Optuna counts it.
        met = bool(theirs.constraints) and all(value <= 0 for value in theirs.constraints.values())
        assert met is (ours.status is TrialStatus.FEASIBLE)
        ran = ours.plan.proposed if ours.plan.refusal else ours.plan.args
        assert theirs.params == {name: ran[name] for name in theirs.params}
        assert set(INCUMBENT) <= set(theirs.params)


def test_an_infeasible_trial_with_a_better_figure_is_not_the_best(tmp_path: Path) -> None:
    made = Made(tmp_path / "run")
    made.search(4, crashes=False)
    good = made.measured(INCUMBENT)
    document = json.loads(RESULT.dump_json(good)) | {"value": -1.0, "violation": 2.0}
    document["measurement"]["ttft_p99_ms"] = 1500.0
    made.add(made.plan(), RESULT.validate_json(json.dumps(document)))
    made.crash(dict(INCUMBENT), Category.OUT_OF_MEMORY, "CUDA out of memory")
    exported(made.close(), "--optuna", f"sqlite:///{tmp_path / 'trials.db'}")

    study = study_of(tmp_path / "trials.db")

    assert study.trials[4].value == 1.0
    assert study.best_trial.number != 4
    assert study.trials[5].state is States.FAIL
    assert study.trials[5].user_attrs["crash"]["category"] == "out_of_memory"


def test_only_crashes_have_no_best(tmp_path: Path) -> None:
    exported(only_crashes(tmp_path / "run"), "--optuna", f"sqlite:///{tmp_path / 'trials.db'}")

    with pytest.raises(ValueError, match="does not exist"):
        _ = study_of(tmp_path / "trials.db").best_trial


def test_goodput_is_raised(tmp_path: Path) -> None:
    exported(whole(tmp_path / "run", 5, objective="goodput"), "--optuna", f"sqlite:///{tmp_path / 'trials.db'}")
    study = study_of(tmp_path / "trials.db")

    assert study.direction is optuna.study.StudyDirection.MAXIMIZE
    assert study.user_attrs["objective"] in METRICS.values()
    assert study.best_value > 0


def test_a_run_that_grew_is_exported_again(tmp_path: Path) -> None:
    made = Made(tmp_path / "run")
    made.search(4, crashes=False)
    running = made.add(made.plan(), None, running=True)
    state, url = made.close(), f"sqlite:///{tmp_path / 'trials.db'}"
    assert "4 trials added" in exported(state, "--optuna", url)  # the running one is left out

    journal = Journal(state)
    journal.end_trial(running, made.measured(INCUMBENT))
    journal.close()

    assert "1 trials added" in exported(state, "--optuna", url)
    assert "0 trials added" in exported(state, "--optuna", url)
    assert len(study_of(tmp_path / "trials.db").trials) == 5


def test_thousands_of_trials_are_exported_in_seconds_as_optuna_would_store_them(tmp_path: Path) -> None:
    made = Made(tmp_path / "run")
    made.search(1000)
    recorded = read_run(made.close())
    began = time.process_time()
    assert optuna_study.add(recorded, f"sqlite:///{tmp_path / 'trials.db'}", "sloguard run 1", lambda new: new) == 1000
    assert time.process_time() - began < 5
    study = study_of(tmp_path / "trials.db")
    # The same trials, each added by Optuna's own way.
    rows = [knobs_that_ran(trial, [knob.name for knob in recorded.setup.knobs]) for trial in recorded.trials]
    spaces = optuna_study.distributions(recorded.setup.knobs, rows)
    expected = optuna.create_study()
    for trial in recorded.trials[:100]:
        expected.add_trial(optuna_study.frozen(trial, recorded.setup, spaces))
    assert [told(trial) for trial in study.trials[:100]] == [told(trial) for trial in expected.trials]


def told(trial: optuna.trial.FrozenTrial) -> tuple[object, ...]:
    times = trial.datetime_start, trial.datetime_complete
    return (trial.number, trial.state, trial.values, trial.params, trial.distributions, trial.user_attrs, *times)


def test_a_study_of_another_run_is_not_added_to(run: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    exported(run, "--optuna", url)
    done = sloguard("export", whole(tmp_path / "other", 3, objective="goodput"), "--optuna", url)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert len(study_of(tmp_path / "trials.db").trials) == len(trials_of(run))


@pytest.mark.parametrize("url", ["nothing:///a.db", "sqlite:////nowhere/at/all.db"])
def test_a_storage_that_is_none_is_one_line(run: Path, url: str) -> None:
    done = sloguard("export", run, "--optuna", url)

    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--optuna: " in done.stderr


def test_a_file_in_place_of_a_storage_is_a_mistake(run: Path, tmp_path: Path) -> None:
    done = sloguard("export", run, "--csv", tmp_path / "trials.csv", "--optuna", "trials.db")

    assert done.returncode == 2
    said = "--optuna 'trials.db': an SQLAlchemy URL such as sqlite:///trials.db is needed"
    assert done.stderr == f"sloguard: {said}\n"
    assert not (tmp_path / "trials.csv").exists()


def test_a_folder_that_is_not_there_is_told_by_the_file_that_was_asked_for(run: Path, tmp_path: Path) -> None:
    done = sloguard("export", run, "--csv", tmp_path / "missing" / "trials.csv")

    assert done.returncode == 1
    assert done.stderr == f"sloguard: {tmp_path}/missing/trials.csv: No such file or directory\n"


@pytest.mark.parametrize("words", [("report", "-o"), ("export", "--csv"), ("export", "--jsonl")])
@pytest.mark.parametrize("path", ["", "/"])
def test_a_folder_in_place_of_a_file_is_one_line(run: Path, words: tuple[str, str], path: str) -> None:
    done = sloguard(words[0], run, words[1], path)

    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "Is a directory" in done.stderr


def test_nothing_to_write_is_a_mistake(run: Path) -> None:
    done = sloguard("export", run)

    assert done.returncode == 2
    assert "one of --optuna, --csv, --jsonl, --bench is needed" in done.stderr


def test_json_lines_are_the_trials(run: Path, tmp_path: Path) -> None:
    exported(run, "--jsonl", tmp_path / "trials.jsonl")
    listed = json.loads(sloguard("trials", run, "--json").stdout)

    assert [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()] == listed


def test_csv_has_the_figures_of_every_trial(run: Path, tmp_path: Path) -> None:
    exported(run, "--csv", tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))

    assert [line["status"] for line in lines] == [str(status) for status in statuses(run)]
    for line, trial in zip(lines, trials_of(run), strict=True):
        measured = trial.result.measurement if trial.result else None
        assert line["ttft_p99_ms"] == ("" if measured is None else str(measured.ttft_p99_ms))
        crash = trial.result.crash if trial.result else None
        assert line["crash_evidence"] == ("" if crash is None else crash.evidence)
        ran = trial.plan.proposed if trial.plan.refusal else trial.plan.args
        assert line["knob.max_num_seqs"] == str(ran["max_num_seqs"])


def test_a_spreadsheet_finds_no_formula(tmp_path: Path) -> None:
    made = Made(tmp_path / "run")
    made.crash(dict(INCUMBENT), Category.STARTUP_FAILURE, '=HYPERLINK("http://evil","click")')
    exported(made.close(), "--csv", tmp_path / "trials.csv")

    with (tmp_path / "trials.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["crash_evidence"].startswith("'=HYPERLINK")


def test_benchmark_results_have_what_the_journal_has(run: Path, tmp_path: Path) -> None:
    said = exported(run, "--bench", tmp_path / "bench")
    rows = {t.number: t for t in trials_of(run)}
    whole_loads = [n for n, t in rows.items() if t.result and t.result.measurement and not t.result.stopped]

    files = sorted((tmp_path / "bench").iterdir())
    assert [file.name for file in files] == [f"run-1-trial-{n:04}.json" for n in whole_loads]
    assert "not in these files: total_input_tokens" in said
    for file, number in zip(files, whole_loads, strict=True):
        content: dict[str, Any] = json.loads(file.read_text())
        result = rows[number].result
        assert result is not None
        assert result.measurement is not None
        assert content["p99_ttft_ms"] == result.measurement.ttft_p99_ms
        assert content["completed"] == 200
        assert content["median_e2el_ms"] < content["p99_e2el_ms"]
        assert content["sloguard_args"] == rows[number].plan.args
