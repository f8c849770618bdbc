"""`sloguard doctor`, `sloguard plan` and the guard ask the agent about vLLM, its machine and the model."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from agent_process import AgentProcess, agent_process
from engine_bench import DEMO
from service_process import at_agent, configured, sloguard

from sidecar.config.schema import load_config
from sidecar.guard.guard import Guard
from sidecar.preflight.engine_host import engine_host
from sidecar.preflight.engine_memory import Own
from sidecar.record.trial import Role
from sidecar.search.contract import Proposal
from vllm_sloguard.guard.machine import Machine

MODEL = "somebody/tiny"
VLLM = "0.31.9"
KV_BYTES_PER_TOKEN = 4096
BUILT = {
    "stages": [
        {
            "weights_bytes": 2**20,
            "embedding_bytes": 2**18,
            "bytes_per_block": 16 * KV_BYTES_PER_TOKEN,
            "bytes_per_token": KV_BYTES_PER_TOKEN,
        }
    ],
    "groups": [{"kind": "full", "block_size": 16}],
    "platform": "cpu",
    "max_model_len": 64,
    "hidden": 8,
    "vocab": 16,
    "block_size": 16,
}
# Stands in for the Python of vLLM's environment: its packages, and the process that builds models.
PYTHON = f"""#!{sys.executable}
import json, os, runpy, sys
if "-c" in sys.argv:
    import importlib.metadata as metadata
    real = metadata.version
    metadata.version = lambda name: {{"vllm": {VLLM!r}, "vllm-sloguard": "0.1.0"}}.get(name) or real(name)
    exec(sys.argv[sys.argv.index("-c") + 1])
else:
    for line in sys.stdin:
        with open({{asked!r}}, "a") as file: file.write(line)
        print({json.dumps(BUILT)!r}, flush=True)
"""


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    folder = tmp_path_factory.mktemp("agent")
    snapshot = folder / "hub" / f"models--{MODEL.replace('/', '--')}" / "snapshots" / "one"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((DEMO / "model" / "config.json").read_bytes())
    python = folder / "python"
    python.write_text(PYTHON.replace("{asked!r}", repr(str(folder / "asked"))))
    python.chmod(0o755)
    hub = str(folder / "hub")
    with agent_process(folder, "--python", str(python), HF_HUB_CACHE=hub, HF_HUB_OFFLINE="1") as process:
        yield process


@pytest.fixture
def config_file(agent: AgentProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    path = at_agent(configured(tmp_path), agent.address)
    content = yaml.safe_load(path.read_text()) | {"model": MODEL}
    content["window"]["duration"] = "60m"
    path.write_text(yaml.safe_dump(content))
    return path


def findings(config_file: Path) -> dict[str, dict[str, Any]]:
    found = sloguard("doctor", "--quick", "--json", "-c", config_file)
    return {one["check"]: one for one in json.loads(found.stdout)["findings"]}


def test_doctor_reports_the_agents_environment(config_file: Path, agent: AgentProcess) -> None:
    found = findings(config_file)
    assert (found["agent"]["level"], agent.address in found["agent"]["text"]) == ("ok", True)
    assert f"{VLLM} in {agent.state.parent}/python" in found["vLLM"]["text"]
    # The name is in the cache of the agent's user, so nothing needs to be downloaded.
    assert found["model"]["level"] == "warning"
    assert "engine.port" not in found
    assert found["window"]["level"] == "ok"


def test_an_agent_that_is_not_there_is_one_problem_with_its_fix(config_file: Path, tmp_path: Path) -> None:
    at_agent(config_file, f"unix://{tmp_path}/none.sock")
    found = findings(config_file)
    assert (found["agent"]["level"], found["agent"]["fix"][:20]) == ("problem", "start sloguard-agent")
    assert "can't be reached" in found["agent"]["text"]
    assert not {"vLLM", "memory", "model", "window"} & set(found)


def test_plan_and_the_guard_know_the_model_by_the_agents_vllm(config_file: Path, agent: AgentProcess) -> None:
    planned = sloguard("plan", "--json", "-c", config_file)
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["vllm_version"] == VLLM
    budget = plan["incumbent"]["budget"]
    assert budget["kv_bytes_per_token"] == KV_BYTES_PER_TOKEN
    asked = [json.loads(line) for line in (agent.state.parent / "asked").read_text().splitlines()]
    assert {one["model"] for one in asked} == {str(agent.state.parent / "hub" / "models--somebody--tiny/snapshots/one")}

    config = load_config(config_file)
    with engine_host(config) as host:
        here, held = host.machine_without(Own(), config.engine.args)
        assert (here.total_bytes > 0, held) == (True, 0)
        small = Machine("cpu", 2**22, 2**22, 0, "a small machine")
        guard = Guard(config, lambda _: small, known_model=host.known_model)
        refused = guard.plan(config.engine.args, Proposal({"max_num_seqs": 4}, "test", ""), Role.SEARCH)
    assert refused.refusal


def test_a_model_is_not_built_with_arguments_that_are_not_allowed(config_file: Path) -> None:
    config = load_config(config_file)
    with engine_host(config) as host:
        known = host.known_model()
        assert known.builds is not None
        assert known.folder is not None
        assert known.builds.built(known.folder, {"trust_remote_code": True}) is None
        assert known.builds.built(known.folder, {"kv_cache_dtype": "fp8"}) is not None
