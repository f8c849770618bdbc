"""The agent that a sidecar starts by itself, on the fake engine: real processes."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from agent_process import served_seqs
from local_agents import end_engines, end_local_agents, local_agent_pid
from service_process import SLOGUARD, configured, ended, sloguard, started, state_of, wait_for

from sidecar.config.schema import LONGEST_SOCKET_PATH, Config, ConfigError, load_config
from sidecar.record.journal import Journal

LEASE_S = 2.0
MAX_RESIDENT_BYTES = 150 * 2**20


@pytest.fixture
def config_file(tmp_path: Path) -> Iterator[Path]:
    path = changed(configured(tmp_path, budget=2), agents=["local"], agent_lease_s=LEASE_S)
    yield path
    end_local_agents(tmp_path)
    end_engines(load_config(path).state)


@pytest.fixture
def config(config_file: Path) -> Config:
    return load_config(config_file)


def changed(path: Path, **engine: object) -> Path:
    content = yaml.safe_load(path.read_text())
    content["engine"] |= engine
    path.write_text(yaml.safe_dump(content))
    return path


def agent_pid(config: Config) -> int | None:
    return local_agent_pid(config.state)


def engine_ids(config: Config) -> set[str]:
    """All engines that were started."""
    return {log.stem for log in (config.state / "logs").glob("engine-*.log")}


def test_a_window_and_ctrl_c_ends_the_agent_and_the_engine(config_file: Path, config: Config) -> None:
    serve = started(config_file)
    pid = agent_pid(config)
    assert pid is not None
    assert (config.state / "agent" / "a.sock").stat().st_mode & 0o777 == 0o600
    assert (config.state / "agent").stat().st_mode & 0o777 == 0o700

    asked = sloguard("retune", "--now", "--wait", "-c", config_file)

    assert "promoting: better in 3 of 3 A/B restarts" in asked.stdout, asked.stderr
    assert served_seqs(config.engine.port) > 2
    assert "stopped, with its engine" in ended(serve, signal.SIGINT)
    assert (served_seqs(config.engine.port), agent_pid(config)) == (0, None)
    assert not psutil.pid_exists(pid)


def test_the_sidecar_imports_neither_vllm_nor_torch_and_takes_little_memory(config_file: Path) -> None:
    changed(config_file, agent_lease_s=10.0)
    content = yaml.safe_load(config_file.read_text()) | {"page": {"port": 0}}
    config_file.write_text(yaml.safe_dump(content))
    config, said = load_config(config_file), config_file.with_name("said.txt")
    with said.open("wb") as output:  # a new process, unlike those of other tests: its imports are its own
        command = [*SLOGUARD, "serve", "-c", str(config_file)]
        serve = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
        )
    wait_for(lambda: state_of(config) == "serving", "serving")
    assert sloguard("retune", "--now", "--wait", "-c", config_file).returncode == 0
    resident = psutil.Process(serve.pid).memory_info().rss
    serve.send_signal(signal.SIGINT)
    assert serve.wait(60) == 0
    lines = said.read_text().splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert {"sidecar.service.tuning_window", "sidecar.page.app", "uvicorn"} <= imported
    assert not {name.partition(".")[0] for name in imported} & {"torch", "vllm"}
    assert resident < MAX_RESIDENT_BYTES, f"{resident / 2**20:.0f} MiB"


def test_sigterm_leaves_the_engine_and_the_next_sidecar_takes_it_over(config_file: Path, config: Config) -> None:
    assert "the engine keeps serving" in ended(started(config_file), signal.SIGTERM)
    assert (served_seqs(config.engine.port), agent_pid(config)) == (2, None)
    refused = sloguard("tune", "-c", config_file)
    assert "vLLM of this state folder is serving" in refused.stderr
    again = started(config_file)
    assert "took over the engine of an earlier sidecar" in ended(again, signal.SIGINT)
    assert served_seqs(config.engine.port) == 0


def test_a_killed_agent_is_started_again_and_no_request_fails(config_file: Path, config: Config) -> None:
    serve = started(config_file)
    pid = agent_pid(config)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: agent_pid(config) not in (None, pid) or served_seqs(config.engine.port) != 2, "another agent")
    assert served_seqs(config.engine.port) == 2
    time.sleep(2 * LEASE_S)
    assert (served_seqs(config.engine.port), state_of(config)) == (2, "serving")
    assert "the local agent has ended, and is started again" in ended(serve, signal.SIGINT)
    assert served_seqs(config.engine.port) == 0


def test_the_agent_of_a_killed_sidecar_restores_the_service(config_file: Path, config: Config) -> None:
    serve = started(config_file, FAKE_LOAD_S="2")
    sloguard("retune", "--now", "-c", config_file)
    wait_for(lambda: state_of(config) == "tuning", "tuning")
    wait_for(lambda: served_seqs(config.engine.port) == 0, "the service is drained")
    pid = agent_pid(config)
    serve.kill()
    serve.communicate()
    wait_for(lambda: served_seqs(config.engine.port) == 2, "the service is restored", 30)

    again = started(config_file)
    assert agent_pid(config) == pid
    trials = Journal(config.state, read_only=True).trials()
    assert not [trial for trial in trials if trial.status in ("crashed", "running")]
    assert "took over the engine of an earlier sidecar" in ended(again, signal.SIGINT)
    assert served_seqs(config.engine.port) == 0
    wait_for(lambda: agent_pid(config) is None, "the agent has ended", 10)  # it is no child of this sidecar


def test_another_environment_needs_another_agent_and_another_engine(config_file: Path, config: Config) -> None:
    serve = started(config_file)
    pid, engine = agent_pid(config), engine_ids(config)
    serve.kill()
    serve.communicate()
    changed(config_file, env={"FAKE_START_S": "0.1"})
    again = started(config_file)
    assert agent_pid(config) not in (None, pid)
    assert len(engine_ids(config) - engine) == 1
    ended(again, signal.SIGINT)


def test_an_engine_that_was_started_without_an_agent_keeps_serving_until_it_is_drained(
    config_file: Path, config: Config
) -> None:
    changed(config_file, agents=[], agent_lease_s=10.0)
    ended(started(config_file), signal.SIGTERM)
    engine = engine_ids(config)
    assert (served_seqs(config.engine.port), len(engine)) == (2, 1)
    changed(config_file, agents=["local"], agent_lease_s=LEASE_S)
    assert "took over the engine of an earlier sidecar" in ended(started(config_file), signal.SIGTERM)
    assert (served_seqs(config.engine.port), engine_ids(config)) == (2, engine)

    serve = started(config_file)
    asked = sloguard("retune", "--now", "--wait", "-c", config_file)
    assert "promoting: better in 3 of 3 A/B restarts" in asked.stdout, asked.stderr
    assert "stopped, with its engine" in ended(serve, signal.SIGINT)
    assert served_seqs(config.engine.port) == 0


def test_an_engine_of_the_agent_is_replaced_by_a_sidecar_without_one(config_file: Path, config: Config) -> None:
    ended(started(config_file), signal.SIGTERM)
    changed(config_file, agents=[], agent_lease_s=10.0)
    assert "serving" in ended(started(config_file), signal.SIGINT)
    assert (served_seqs(config.engine.port), len(engine_ids(config))) == (0, 2)


def test_tune_leaves_nothing_behind(config_file: Path, config: Config) -> None:
    tuned = sloguard("tune", "-c", config_file)
    assert tuned.returncode == 0, tuned.stderr + tuned.stdout
    assert "better in 3 of 3 A/B restarts" in tuned.stdout
    assert agent_pid(config) is None
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(config.state) in " ".join(p.info["cmdline"] or ())]


def test_a_python_that_is_not_there_is_one_line(config_file: Path) -> None:
    changed(config_file, python="/no/python")
    refused = sloguard("serve", "-c", config_file)
    assert refused.returncode == 1
    assert "the local agent does not start:" in refused.stderr
    assert "--python: '/no/python'" in refused.stderr


def test_the_sockets_fit_into_the_longest_state_folder_that_is_allowed(tmp_path: Path) -> None:
    path = changed(configured(tmp_path, budget=2), agents=["local"])
    longest = LONGEST_SOCKET_PATH - len("/sidecar.sock")
    for length, allowed in ((longest, True), (longest + 1, False)):
        state = tmp_path / ("x" * (length - len(str(tmp_path)) - 1))
        content = yaml.safe_load(path.read_text()) | {"state": str(state)}
        path.write_text(yaml.safe_dump(content))
        if allowed:
            assert "stopped, with its engine" in ended(started(path), signal.SIGINT)
        else:
            with pytest.raises(ConfigError, match="too long a path for a Unix socket"):
                load_config(path)
