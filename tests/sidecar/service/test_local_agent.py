"""`engine.agents: [local]`: a sidecar whose agent it starts by itself, on the fake engine: real processes."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from agent_process import served_seqs
from service_process import configured, ended, sloguard, started, state_of, wait_for

from sidecar.config.schema import Config, ConfigError, load_config
from sidecar.record.journal import Journal
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.agent.process_identity import Identity

LEASE_S = 2.0


@pytest.fixture
def config_file(tmp_path: Path) -> Iterator[Path]:
    path = with_local_agent(configured(tmp_path, budget=2))
    yield path
    config = load_config(path)
    if (pid := agent_pid(config)) is not None:
        os.kill(pid, signal.SIGKILL)
    for log in (config.state / "logs").glob("engine-*.log"):
        ProcessGroup(Identity(-1, 0.0, log.stem.removeprefix("engine-"))).kill()


@pytest.fixture
def config(config_file: Path) -> Config:
    return load_config(config_file)


def with_local_agent(path: Path, **engine: object) -> Path:
    content = yaml.safe_load(path.read_text())
    content["engine"] |= {"agents": ["local"], "agent_lease_s": LEASE_S, **engine}
    path.write_text(yaml.safe_dump(content))
    return path


def agent_pid(config: Config) -> int | None:
    """The agent of a state folder; None without one."""
    # Without taking the lock, which an agent that starts now would not get then.
    with suppress(OSError, ValueError, psutil.Error):
        pid = int((config.state / "agent" / "lock").read_text())
        if "vllm_sloguard.agent" in psutil.Process(pid).cmdline():
            return pid
    return None


def test_a_window_and_ctrl_c_ends_the_agent_and_the_engine(config_file: Path, config: Config) -> None:
    serve = started(config_file)
    pid = agent_pid(config)
    assert pid is not None
    assert (config.state / "agent" / "agent.sock").stat().st_mode & 0o777 == 0o600
    assert (config.state / "agent").stat().st_mode & 0o777 == 0o700

    asked = sloguard("retune", "--now", "--wait", "-c", config_file)

    assert "promoting: better in 3 of 3 A/B restarts" in asked.stdout, asked.stderr
    assert served_seqs(config.engine.port) > 2
    assert "stopped, with its engine" in ended(serve, signal.SIGINT)
    assert (served_seqs(config.engine.port), agent_pid(config)) == (0, None)
    assert not psutil.pid_exists(pid)


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
    assert (served_seqs(config.engine.port), agent_pid(config)) == (0, None)


def test_another_environment_needs_another_agent_and_the_engine_is_kept_until_then(
    config_file: Path, config: Config
) -> None:
    serve = started(config_file)
    pid = agent_pid(config)
    serve.kill()
    serve.communicate()
    with_local_agent(config_file, env={"FAKE_START_S": "0.1"})
    again = started(config_file)
    assert agent_pid(config) not in (None, pid)
    ended(again, signal.SIGINT)


def test_an_engine_from_before_the_agent_is_replaced_and_back(config_file: Path, config: Config) -> None:
    content = yaml.safe_load(config_file.read_text())
    for name in ("agents", "agent_lease_s"):
        content["engine"].pop(name)
    config_file.write_text(yaml.safe_dump(content))
    ended(started(config_file), signal.SIGTERM)
    assert served_seqs(config.engine.port) == 2
    with_local_agent(config_file)
    ended(started(config_file), signal.SIGTERM)
    assert served_seqs(config.engine.port) == 2
    config_file.write_text(yaml.safe_dump(content))
    assert "serving" in ended(started(config_file), signal.SIGINT)
    assert served_seqs(config.engine.port) == 0


def test_tune_leaves_nothing_behind(config_file: Path, config: Config) -> None:
    tuned = sloguard("tune", "-c", config_file)
    assert tuned.returncode == 0, tuned.stderr + tuned.stdout
    assert "better in 3 of 3 A/B restarts" in tuned.stdout
    assert agent_pid(config) is None
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(config.state) in " ".join(p.info["cmdline"] or ())]


def test_a_python_that_is_not_there_is_one_line(config_file: Path) -> None:
    with_local_agent(config_file, python="/no/python")
    refused = sloguard("serve", "-c", config_file)
    assert refused.returncode == 1
    assert "the local agent does not start:" in refused.stderr
    assert "--python: '/no/python'" in refused.stderr


def test_a_state_folder_whose_sockets_would_have_too_long_paths_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * (91 - len(str(tmp_path))))
    folder.mkdir()
    path = configured(folder)
    content = yaml.safe_load(path.read_text()) | {"state": str(folder)}
    path.write_text(yaml.safe_dump(content))
    load_config(path)
    with pytest.raises(ConfigError, match="too long a path for a Unix socket"):
        load_config(with_local_agent(path))
