"""A state folder of version 0.1.0 still opens: one window that promoted, a rollback, a pause; its engine is gone."""

import json
import signal
import sqlite3
from pathlib import Path

import pytest
from service_process import configured, ended, sloguard, started

from sidecar.config.schema import load_config
from sidecar.record.journal import Journal
from sidecar.record.states import Cause
from sidecar.record.trial import Role, TrialStatus
from vllm_sloguard.agent.process_group import Identity, ProcessGroup

DUMP = Path(__file__).parent / "golden" / "journal_0.1.0.sql"


def restored(state: Path) -> Path:
    """Writes the journal into ``state``."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    connection = sqlite3.connect(state / "journal.sqlite")
    connection.executescript(DUMP.read_text(encoding="utf-8"))
    connection.close()
    return state


def test_every_trial_is_read(tmp_path: Path) -> None:
    journal = Journal(restored(tmp_path / "state"))
    trials = journal.trials()
    journal.close()

    assert [t.plan.role for t in trials[:2]] == [Role.BASELINE, Role.UNGUARDED]
    assert [t.plan.role for t in trials].count(Role.VALIDATION) == 3
    assert {t.status for t in trials} == {TrialStatus.FEASIBLE}
    first = trials[0].result
    assert first is not None
    assert first.measurement is not None
    assert first.measurement.ttft_p99_ms == pytest.approx(218.808)
    assert first.measurement.itl_p99_ms == pytest.approx(10.0)


@pytest.mark.parametrize("command", ["status", "trials", "history", "report"])
def test_every_command_reads_it(tmp_path: Path, command: str) -> None:
    config_file = configured(tmp_path)
    state = restored(load_config(config_file).state)
    words: dict[str, list[object]] = {"history": ["-c", config_file], "report": [state, "-o", tmp_path / "report.html"]}

    done = sloguard(command, *words.get(command, [state]))

    assert (done.returncode, done.stderr) == (0, "")
    if command == "report":
        assert "83.3" in (tmp_path / "report.html").read_text(encoding="utf-8")
    elif command != "trials":
        assert "promot" in done.stdout


def test_serve_goes_on_with_it(tmp_path: Path) -> None:
    config_file = configured(tmp_path)
    config = load_config(config_file)
    restored(config.state)
    try:
        process = started(config_file)
        status = sloguard("status", config.state, "--json")
        ended(process, signal.SIGINT)
        assert status.returncode == 0, status.stderr
        assert json.loads(status.stdout)["state"] == "serving"
    finally:
        for log in (config.state / "logs").glob("engine-*.log"):
            ProcessGroup(Identity(-1, 0.0, log.stem.removeprefix("engine-"))).kill()


def test_how_the_sidecar_ended_is_known_without_reading_its_sentence(tmp_path: Path) -> None:
    journal = Journal(restored(tmp_path / "state"))
    last = journal.state()
    journal.close()

    assert last is not None
    assert (last.state, last.cause) == ("halted", Cause.ENGINE_LEFT)
