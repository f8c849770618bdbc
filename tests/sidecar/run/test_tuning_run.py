"""Which unfinished run is resumed, and which one is abandoned."""

import json
from pathlib import Path
from typing import Any

import pytest
from sidecar_cases import configured, planned, served

from sidecar.record.decisions import Decision, Outcome
from sidecar.record.journal import Journal
from sidecar.record.trial import Role, TrialStatus
from sidecar.run.tuning_run import incumbent_args, open_run


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "state")


def test_a_run_resumes_and_its_trial_in_flight_is_aborted(tmp_path: Path, journal: Journal) -> None:
    config = configured(tmp_path)
    run = open_run(config, journal)
    ended = journal.end_trial(journal.begin_trial(run.id, planned(Role.BASELINE)), served(-1.0))
    journal.begin_trial(run.id, planned())

    assert open_run(config, journal) == run

    assert journal.trials()[0] == ended
    assert [trial.status for trial in journal.trials()] == [TrialStatus.FEASIBLE, TrialStatus.ABORTED]


def test_a_run_resumes_if_only_the_window_or_the_port_changed(tmp_path: Path, journal: Journal) -> None:
    run = open_run(configured(tmp_path), journal)

    assert open_run(configured(tmp_path, "window.cron", "0 3 * * *"), journal) == run
    assert open_run(configured(tmp_path, "metrics.port", 1), journal) == run


@pytest.mark.parametrize(("place", "value"), [("workload.rate", 5), ("slo.itl_p99_ms", 9), ("search.budget", 3)])
def test_a_changed_configuration_abandons_the_run(tmp_path: Path, journal: Journal, place: str, value: Any) -> None:
    first = open_run(configured(tmp_path), journal)
    journal.begin_trial(first.id, planned())

    second = open_run(configured(tmp_path, place, value), journal)

    assert second.id != first.id
    assert [trial.status for trial in journal.trials(first.id)] == [TrialStatus.ABORTED]
    assert journal.trials(second.id) == []
    assert decisions(tmp_path / "state") == ["abandoned", None]


def test_a_decided_run_is_not_opened_again(tmp_path: Path, journal: Journal) -> None:
    config = configured(tmp_path)
    first = open_run(config, journal)
    journal.end_run(first.id, Decision(Outcome.KEPT, "no better one"))

    assert open_run(config, journal).id != first.id
    assert decisions(tmp_path / "state") == ["kept", None]


def test_the_incumbent_is_the_promotion_as_long_as_the_file_s_arguments_stay(tmp_path: Path, journal: Journal) -> None:
    config = configured(tmp_path, "engine.args", {"max_num_seqs": 2})
    assert incumbent_args(config, journal) == {"max_num_seqs": 2}
    journal.promote(1, config.base_digest(), {"max_num_seqs": 64})

    assert open_run(config, journal).incumbent == {"max_num_seqs": 64}
    assert incumbent_args(configured(tmp_path, "engine.args", {"max_num_seqs": 3}), journal) == {"max_num_seqs": 3}


def test_the_environment_of_the_engine_is_not_recorded(tmp_path: Path, journal: Journal) -> None:
    open_run(configured(tmp_path, "engine.env", {"HF_TOKEN": "a-secret"}), journal)
    journal.close()

    written = b"".join(file.read_bytes() for file in (tmp_path / "state").iterdir())
    assert b"max_num_seqs" in written
    assert b"a-secret" not in written


def decisions(folder: Path) -> list[Any]:
    import sqlite3

    rows = sqlite3.connect(folder / "journal.sqlite").execute("SELECT decision FROM runs ORDER BY id").fetchall()
    return [json.loads(row[0])["outcome"] if row[0] else None for row in rows]
