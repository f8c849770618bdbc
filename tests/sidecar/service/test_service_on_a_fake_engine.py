"""`sloguard serve` and `tune` as processes, on a fast fake engine that fails on demand."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_bench import write_config
from fake_vllm import DIES, HANGS, OUT_OF_MEMORY
from service_process import (
    SLOGUARD,
    configured,
    ended,
    ready,
    serving_seqs,
    sloguard,
    started,
    state_of,
    wait_for,
)

from sidecar.config.schema import load_config
from sidecar.record.journal import Journal
from sidecar.record.trial import Role, TrialStatus
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.agent.process_identity import Identity


@pytest.fixture
def config_file(tmp_path: Path) -> Iterator[Path]:
    """A configuration with a slow incumbent; all processes are ended after the test."""
    path = configured(tmp_path)
    yield path
    state = load_config(path).state
    for log in (state / "logs").glob("engine-*.log"):
        ProcessGroup(Identity(-1, 0.0, log.stem.removeprefix("engine-"))).kill()


def test_a_window_promotes_the_better_configuration(config_file: Path) -> None:
    config = load_config(config_file)
    serve = started(config_file)
    assert (serving_seqs(config), ready(config)) == (2, 200)

    asked = sloguard("retune", "--now", "--wait", "-c", config_file)
    assert asked.returncode == 0, asked.stderr
    assert "trial 1 baseline: max_num_seqs=2: feasible" in asked.stdout
    assert "promoting: better in 3 of 3 A/B restarts" in asked.stdout
    lines = [line.partition(":")[0] for line in asked.stdout.splitlines()]
    assert lines.index("tuning") < lines.index("trial 1 baseline") < lines.index("validating")
    validation = [n for n, line in enumerate(lines) if line.endswith((" reference", " validation"))]
    assert lines.index("validating") < min(validation)
    assert max(validation) < lines.index("promoting")
    assert serving_seqs(config) > 2
    assert ready(config) == 200
    assert "# Decision: promoted" in (config.state / "promoted.yaml").read_text()
    journal = Journal(config.state, read_only=True)
    [validating] = [state for state in journal.states() if state.state == "validating"]
    assert validating.at <= min(t.started_at for t in journal.trials() if t.plan.role is Role.REFERENCE)
    output = ended(serve, signal.SIGINT)
    assert "halted: stopped, with its engine" in output
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+ trial 1 baseline: ", output, re.MULTILINE)
    assert serving_seqs(config) == 0

    # The promoted configuration is now serving.
    again = started(config_file)
    assert serving_seqs(config) > 2
    ended(again, signal.SIGINT)


def test_crashes_are_observations_and_the_incumbent_is_restored(tmp_path: Path) -> None:
    config_file = configured(
        tmp_path,
        incumbent=12,
        unguarded=(OUT_OF_MEMORY, HANGS, DIES),
        start_timeout_s=10,
        budget=5,
        knobs={"max_num_seqs": {"low": 4, "high": 6}},
    )
    config = load_config(config_file)
    serve = started(config_file)
    asked = sloguard("retune", "--now", "--wait", "-c", config_file)
    assert asked.returncode == 0, asked.stderr
    trials = json.loads(sloguard("trials", config.state, "--json").stdout)
    crashes = {t["plan"]["args"]["max_num_seqs"]: t["result"]["crash"] for t in trials if t["status"] == "crashed"}
    assert crashes[OUT_OF_MEMORY]["category"] == "out_of_memory"
    assert "CUDA out of memory" in crashes[OUT_OF_MEMORY]["evidence"]
    assert crashes[OUT_OF_MEMORY]["exit_code"] == 1
    assert (crashes[HANGS]["category"], crashes[HANGS]["phase"]) == ("timeout", "starting")
    assert (crashes[DIES]["category"], crashes[DIES]["phase"]) == ("engine_death", "serving")
    assert "kept (no better candidate)" in sloguard("status", config.state).stdout
    assert serving_seqs(config) == 12
    ended(serve, signal.SIGINT)


def test_an_slo_that_nothing_meets_names_the_rate_that_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_file = configured(tmp_path, budget=2)
    config = load_config(config_file)
    monkeypatch.setenv("FAKE_CAPACITY_RPS", str(0.6 * config.workload.rate))
    serve = started(config_file)
    asked = sloguard("retune", "--now", "--wait", "-c", config_file)
    assert asked.returncode == 0, asked.stderr

    trials = Journal(config.state, read_only=True).trials()
    assert [t.plan.role for t in trials] == [Role.BASELINE, Role.SEARCH, Role.LOWER_RATE]
    assert trials[-1].status is TrialStatus.INFEASIBLE
    facts = json.loads(sloguard("status", config.state, "--json").stdout)
    miss = facts["decision"]["nearest_miss"]
    assert miss["trial"] in (1, 2)
    assert miss["excess"] > 1
    assert 0.5 * config.workload.rate <= miss["highest_rate"] <= 0.6 * config.workload.rate < miss["lowest_missed"]
    assert f"it meets the SLO at {miss['highest_rate']:.3g} requests/s" in sloguard("status", config.state).stdout
    ended(serve, signal.SIGINT)


def test_a_serving_engine_that_dies_is_started_again(config_file: Path) -> None:
    config = load_config(config_file)
    serve = started(config_file)
    [record] = Journal(config.state, read_only=True).engines()
    os.kill(record.identity.pid, signal.SIGKILL)
    wait_for(lambda: serving_seqs(config) == 2 and state_of(config) == "serving", "serving again")
    assert Journal(config.state, read_only=True).engines()[0].identity.pid != record.identity.pid
    assert "the serving engine crashed: engine_death" in ended(serve, signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_engine_serves_on_without_its_sidecar_and_is_taken_over(config_file: Path, number: signal.Signals) -> None:
    config = load_config(config_file)
    serve = started(config_file)
    [record] = Journal(config.state, read_only=True).engines()
    serve.send_signal(number)
    serve.communicate(timeout=120)
    assert serving_seqs(config) == 2

    refused = sloguard("tune", "-c", config_file)
    assert refused.returncode == 1
    assert f"process {record.identity.pid}" in refused.stderr

    again = started(config_file)
    assert [r.identity for r in Journal(config.state, read_only=True).engines()] == [record.identity]
    assert "took over the engine of an earlier sidecar" in ended(again, signal.SIGINT)
    assert serving_seqs(config) == 0


def test_sigterm_in_a_window_restores_the_incumbent(config_file: Path) -> None:
    config = load_config(config_file)
    serve = started(config_file, FAKE_LOAD_S="60")
    assert sloguard("retune", "--now", "-c", config_file).returncode == 0
    wait_for(lambda: [r.role for r in Journal(config.state, read_only=True).engines()] == ["trial"], "a trial")
    assert state_of(config) == "tuning"
    assert ready(config) == 503
    assert sloguard("retune", "--now", "-c", config_file).returncode == 1
    ended(serve, signal.SIGTERM)
    assert serving_seqs(config) == 2
    trials = json.loads(sloguard("trials", config.state, "--json").stdout)
    assert [t["status"] for t in trials] == ["aborted"]


def test_a_sidecar_killed_in_a_window_restores_when_it_is_back(config_file: Path) -> None:
    config = load_config(config_file)
    serve = started(config_file, FAKE_LOAD_S="60")
    assert sloguard("retune", "--now", "-c", config_file).returncode == 0
    wait_for(lambda: [r.role for r in Journal(config.state, read_only=True).engines()] == ["trial"], "a trial")
    [orphan] = Journal(config.state, read_only=True).engines()
    serve.kill()
    serve.communicate(timeout=120)

    again = started(config_file)
    assert serving_seqs(config) == 2
    assert ProcessGroup(orphan.identity).members() == []
    status = json.loads(sloguard("status", config.state, "--json").stdout)
    assert status["decision"]["outcome"] == "interrupted"
    ended(again, signal.SIGINT)


def test_a_window_ends_in_time(config_file: Path) -> None:
    """A second trial would not leave time for the restore, so none is started."""
    config = load_config(config_file)
    serve = started(config_file, FAKE_LOAD_S="8")
    assert sloguard("retune", "--now", "--wait", "--for", "20s", "-c", config_file).returncode == 0
    *_, tuning, restoring, serving = Journal(config.state, read_only=True).states()
    assert [s.state for s in (tuning, restoring, serving)] == ["tuning", "restoring", "serving"]
    assert tuning.until is not None
    assert serving.at < tuning.until
    assert serving_seqs(config) == 2
    assert len(json.loads(sloguard("trials", config.state, "--json").stdout)) == 1
    ended(serve, signal.SIGINT)


def test_a_promoted_configuration_that_no_longer_starts_is_undone(config_file: Path) -> None:
    config = load_config(config_file)
    journal = Journal(config.state)
    journal.promote(None, config.base_digest(), {**config.engine.args, "max_num_seqs": OUT_OF_MEMORY})
    journal.close()
    serve = started(config_file)
    assert serving_seqs(config) == 2
    assert "out_of_memory" in ended(serve, signal.SIGINT)


def test_what_can_not_start_is_one_line(tmp_path: Path) -> None:
    config_file = configured(tmp_path, incumbent=OUT_OF_MEMORY)
    failed = sloguard("serve", "-c", config_file)
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert "CUDA out of memory" in failed.stderr
    told = sloguard("status", load_config(config_file).state).stdout
    assert told.startswith("sidecar: not running; it ended 20")
    assert "failed: the engine did not start: out_of_memory: torch.OutOfMemoryError: CUDA out of memory" in told
    assert "state:" not in told

    missing = write_config(tmp_path, engine={"python": "/nowhere/python"})
    failed = sloguard("tune", "-c", missing)
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert "/nowhere/python" in failed.stderr


def test_a_first_start_that_hangs_is_tried_again(config_file: Path) -> None:
    config = load_config(configured(config_file.parent, start_timeout_s=15))
    # It is stopped long before it could come up.
    command, env = [*SLOGUARD, "serve", "-c", str(config_file)], {**os.environ, "FAKE_START_S": "5"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as serve:
        try:
            log = wait_for(lambda: next((config.state / "logs").glob("engine-*.log"), None), "an engine")
            engine = ProcessGroup(Identity(-1, 0.0, log.stem.removeprefix("engine-")))
            for process in wait_for(engine.members, "its process"):
                process.suspend()
            wait_for(lambda: serve.poll() is not None or state_of(config) == "serving", "serving")
            assert serving_seqs(config) == 2
        finally:
            serve.send_signal(signal.SIGINT)
    assert serve.returncode == 0
