"""`sloguard serve` whose engines an agent runs, on the fake engine: windows, restarts, faults."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_process import AgentProcess, agent_process, served_seqs
from fake_vllm import OUT_OF_MEMORY
from service_process import at_agent, configured, ended, sloguard, started

from sidecar.config.schema import load_config
from sidecar.record.journal import Journal


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    with agent_process(tmp_path) as process:
        yield process


def test_a_whole_window(agent: AgentProcess, tmp_path: Path) -> None:
    config_file = at_agent(configured(tmp_path, unguarded=(OUT_OF_MEMORY,)), agent.address)
    config = load_config(config_file)
    serve = started(config_file)
    port = config.engine.port
    assert served_seqs(port) == 2

    asked = sloguard("retune", "--now", "--wait", "-c", config_file)

    assert asked.returncode == 0, asked.stderr + asked.stdout
    assert "promoting: better in 3 of 3 A/B restarts" in asked.stdout
    assert served_seqs(port) > 2
    trials = Journal(config.state, read_only=True).trials()
    crashes = [trial.result.crash for trial in trials if trial.result is not None and trial.result.crash is not None]
    assert [crash.category for crash in crashes] == ["out_of_memory"]
    assert "CUDA out of memory" in crashes[0].evidence

    # The agent keeps the service, and the next sidecar adopts it.
    promoted = served_seqs(port)
    assert "the engine keeps serving" in ended(serve, signal.SIGINT)
    assert served_seqs(port) == promoted
    again = started(config_file)
    assert "took over the engine of an earlier sidecar" in ended(again, signal.SIGTERM)
    assert served_seqs(port) == promoted
    assert len(list((agent.state / "logs").glob("engine-*.log"))) == len(agent.engine_ids())
