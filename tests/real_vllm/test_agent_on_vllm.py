"""The agent with real vLLM in one namespace, and a sidecar that can import neither vLLM nor torch in another."""

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from engine_bench import DEMO, write_config
from service_process import at_agent, sloguard, state_of, wait_for

from sidecar.config.schema import Config, load_config
from sidecar.record.journal import Journal
from vllm_sloguard.agent.engine_http import EngineHttp, Unanswered

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

# The demo's arguments that are no knobs.
ALLOWED = "load_format,dtype"
_MAX_RESIDENT_BYTES = 150 * 2**20
_START_S = 600.0


def hidden(*folders: Path) -> str:
    """Shell commands that put empty folders over ``folders``."""
    return " && ".join(f"mount -t tmpfs none {shlex.quote(str(folder))}" for folder in folders)


@contextmanager
def in_namespaces(log: Path, hide: tuple[Path, ...], command: list[str]) -> Generator["subprocess.Popen[bytes]"]:
    """``command`` as process 1 of a process namespace of its own, without the folders ``hide``."""
    script = f"{hidden(*hide)} && exec {shlex.join(command)}"
    line = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL", "sh", "-c", script]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(line, stdout=output, stderr=output, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def inner(process: "subprocess.Popen[bytes]") -> psutil.Process:
    """The process that unshare has started."""
    return psutil.Process(process.pid).children()[0]


def package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def serving(config: Config) -> str:
    """The text of a completion; empty without one."""
    try:
        return EngineHttp(config.engine.host, config.engine.port).complete("a", 4, 30)
    except Unanswered:
        return ""


@pytest.mark.skipif(os.environ.get("SLOGUARD_LONG_TESTS") != "1", reason="ten minutes; set SLOGUARD_LONG_TESTS=1")
@pytest.mark.skipif(os.geteuid() != 0, reason="mount namespaces need root")
def test_a_window_across_namespaces(tmp_path: Path) -> None:
    socket, agent_state = tmp_path / "socket" / "agent.sock", tmp_path / "agent"
    for folder in (socket.parent, agent_state, tmp_path / "state"):
        folder.mkdir(mode=0o700)
    config_file = at_agent(
        write_config(
            tmp_path,
            search={"budget": 4, "knobs": {"max_num_seqs": {"low": 16, "high": 64}}},
            workload={"rate": 30, "requests": 150},  # more than two requests at once can take
            window={"duration": "60m", "notice": "1s"},
            promotion={"pairs": [3]},
        ),
        f"unix://{socket}",
        start_timeout_s=_START_S,
    )
    content = yaml.safe_load(config_file.read_text())
    # 150 requests resolve the 90th percentile, and no limit is near on a slow machine.
    content["slo"] = {"ttft_p90_ms": 60000, "e2e_p90_ms": 60000}
    config_file.write_text(yaml.safe_dump(content))
    config = load_config(config_file)
    options = ["--state", str(agent_state), "--listen", f"unix://{socket}", "--allow", ALLOWED]
    agent = [sys.executable, "-m", "vllm_sloguard.agent", *options]
    sidecar = [sys.executable, "-m", "sidecar", "serve", "-c", str(config_file)]
    without = (package("vllm"), package("torch"), DEMO / "model", agent_state)
    with in_namespaces(tmp_path / "agent.log", (config.state,), agent) as hands:
        wait_for(socket.exists, "the agent")
        with in_namespaces(tmp_path / "sidecar.log", without, sidecar) as brain:
            wait_for(lambda: brain.poll() is not None or state_of(config) == "serving", "serving", _START_S)
            said = (tmp_path / "sidecar.log").read_text
            assert brain.poll() is None, said()
            assert serving(config)
            asked = sloguard("retune", "--now", "--wait", "-c", config_file)
            print(asked.stdout, asked.stderr)
            assert asked.returncode == 0, said()
            results = [trial.result for trial in Journal(config.state, read_only=True).trials()]
            crashed = [result.crash for result in results if result is not None and result.crash is not None]
            assert [crash.phase for crash in crashed] == ["starting"]
            assert crashed[0].evidence
            assert "promoting: better in 3 of 3 A/B restarts" in asked.stdout
            assert serving(config)
            resident = inner(brain).memory_info().rss
            print(f"the sidecar's resident memory: {resident / 2**20:.0f} MiB")
            undone = sloguard("rollback", "-c", config_file)
            assert undone.returncode == 0, undone.stderr
            wait_for(lambda: "was rolled back" in said() and state_of(config) == "serving", "rolled back", _START_S)
            assert serving(config)
            assert resident < _MAX_RESIDENT_BYTES
            inner(brain).send_signal(signal.SIGTERM)
            brain.wait(60)
        # Without its sidecar the service goes on.
        time.sleep(1)
        assert serving(config)
        inner(hands).send_signal(signal.SIGTERM)
        hands.wait(60)
