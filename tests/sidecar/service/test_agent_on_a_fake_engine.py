"""`sloguard serve` whose engines an agent runs, on the fake engine: windows, restarts, faults."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from agent_process import AgentProcess, agent_process, served_seqs
from fake_vllm import OUT_OF_MEMORY
from service_process import LEASE_S, SLOGUARD, at_agent, configured, ended, sloguard, started, state_of, wait_for
from weak_link import LinkState, WeakLink

from sidecar.config.schema import Config, load_config
from sidecar.record.journal import Journal
from sidecar.record.trial import Trial
from vllm_sloguard.wire import agent_pb2 as pb
from vllm_sloguard.wire.agent_pb2_grpc import AgentServiceStub

MAX_RESIDENT_BYTES = 150 * 2**20
# Longer than the lease that ``at_agent`` sets.
BEYOND_THE_LEASE_S = LEASE_S + 1.0


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    with agent_process(tmp_path) as process:
        yield process


@pytest.fixture
def slow_agent(tmp_path: Path) -> Iterator[AgentProcess]:
    """Its trials last long enough for a fault to strike in one."""
    with agent_process(tmp_path, FAKE_LOAD_S="2") as process:
        yield process


def test_a_whole_window(agent: AgentProcess, tmp_path: Path) -> None:
    config_file = at_agent(configured(tmp_path, budget=3, unguarded=(OUT_OF_MEMORY,)), agent.address)
    config = load_config(config_file)
    serve = started(config_file)
    port = config.engine.port
    assert served_seqs(port) == 2
    current = f"serving: the file's arguments at http://127.0.0.1:{port}, since 20"
    assert current in sloguard("status", "-c", config_file).stdout

    asked = sloguard("retune", "--now", "--wait", "-c", config_file)

    assert asked.returncode == 0, asked.stderr + asked.stdout
    assert "promoting: better in 3 of 3 A/B restarts" in asked.stdout
    assert served_seqs(port) > 2
    trials = Journal(config.state, read_only=True).trials()
    crashes = [trial.result.crash for trial in trials if trial.result is not None and trial.result.crash is not None]
    assert [crash.category for crash in crashes] == ["out_of_memory"]
    assert "CUDA out of memory" in crashes[0].evidence

    # It needs neither vLLM nor torch, and little memory.
    mapped = Path(f"/proc/{serve.pid}/maps").read_text()
    assert not [line for line in mapped.splitlines() if "/torch/" in line or "/vllm/" in line]
    resident = psutil.Process(serve.pid).memory_info().rss
    assert resident < MAX_RESIDENT_BYTES, f"{resident / 2**20:.0f} MiB"
    print(f"the sidecar's resident memory: {resident / 2**20:.0f} MiB")

    # The agent keeps the service, and the next sidecar adopts it.
    promoted = served_seqs(port)
    assert "the engine keeps serving" in ended(serve, signal.SIGINT)
    assert served_seqs(port) == promoted
    again = started(config_file)
    assert "took over the engine of an earlier sidecar" in ended(again, signal.SIGTERM)
    assert served_seqs(port) == promoted
    assert len(list((agent.state / "logs").glob("engine-*.log"))) == len(agent.engine_ids())


@pytest.fixture
def link(agent: AgentProcess, tmp_path: Path) -> Iterator[WeakLink]:
    between = WeakLink(tmp_path / "link.sock", agent.socket)
    yield between
    between.close()


def tuning(config: Config) -> None:
    """Waits until a trial's engine runs."""
    wait_for(lambda: state_of(config) == "tuning", "tuning")
    wait_for(lambda: Journal(config.state, read_only=True).trials(), "a trial")


def finished(config: Config) -> list[Trial]:
    return [trial for trial in Journal(config.state, read_only=True).trials() if trial.result is not None]


def back_within(port: int, seqs: int, seconds: float) -> None:
    """The service answers again within ``seconds``, with ``seqs``."""
    wait_for(lambda: served_seqs(port) == seqs, "the service is back", seconds)


def lease_left_s(agent: AgentProcess) -> float:
    with grpc.insecure_channel(agent.address.replace("unix://", "unix:")) as channel:
        return AgentServiceStub(channel).Describe(pb.DescribeRequest(), timeout=10).lease_left_seconds


def retune(config_file: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*SLOGUARD, "retune", "--now", "--wait", "-c", str(config_file)], stdout=subprocess.PIPE, text=True
    )


def test_a_killed_sidecar_leaves_the_service_in_the_agents_hands(slow_agent: AgentProcess, tmp_path: Path) -> None:
    agent = slow_agent
    config_file = at_agent(configured(tmp_path), agent.address)
    config, port = load_config(config_file), load_config(config_file).engine.port
    serve = started(config_file)
    asked = retune(config_file)
    tuning(config)
    assert served_seqs(port) == 0
    serve.kill()
    serve.communicate()
    asked.communicate(timeout=60)

    back_within(port, 2, 30)  # the agent restores it once the lease has expired
    assert "no sidecar has the agent" in agent.log.read_text()
    before = len(agent.engine_ids())
    again = started(config_file)
    assert (served_seqs(port), len(agent.engine_ids())) == (2, before)
    statuses = [trial.status for trial in Journal(config.state, read_only=True).trials()]
    assert "crashed" not in statuses
    ended(again, signal.SIGTERM)


def test_a_killed_agent_leaves_the_service_and_its_successor_serves_the_sidecar(
    agent: AgentProcess, tmp_path: Path
) -> None:
    config_file = at_agent(configured(tmp_path, budget=1), agent.address)
    config, port = load_config(config_file), load_config(config_file).engine.port
    serve = started(config_file)
    agent.end(signal.SIGKILL)
    for _ in range(20):
        assert served_seqs(port) == 2
        time.sleep(0.05)
    agent.start()
    asked = retune(config_file)
    tuning(config)
    agent.end(signal.SIGKILL)
    agent.start()
    asked.communicate(timeout=120)

    wait_for(lambda: served_seqs(port), "the service is back", 30)
    wait_for(lambda: state_of(config) == "serving", "serving")
    trials = Journal(config.state, read_only=True).trials()
    assert not [trial for trial in trials if trial.result is not None and trial.result.crash is not None]
    again = sloguard("retune", "--now", "--wait", "--force", "-c", config_file)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(finished(config)) > len([trial for trial in trials if trial.result is not None])
    assert served_seqs(port) == 2
    ended(serve, signal.SIGTERM)


def test_a_killed_engine_is_started_again(agent: AgentProcess, tmp_path: Path) -> None:
    config_file = at_agent(configured(tmp_path), agent.address)
    config, port = load_config(config_file), load_config(config_file).engine.port
    serve = started(config_file)
    [record] = Journal(config.state, read_only=True).engines()
    os.kill(record.identity.pid, signal.SIGKILL)
    wait_for(lambda: len(agent.engine_ids()) == 2, "another engine")
    back_within(port, 2, 30)
    wait_for(lambda: state_of(config) == "serving", "serving")
    assert "the serving engine crashed: engine_death" in ended(serve, signal.SIGTERM)


@pytest.mark.parametrize("state", [LinkState.CUT, LinkState.SILENT, LinkState.HALF_CLOSED])
def test_a_link_that_fails_while_serving_disturbs_nobody(
    agent: AgentProcess, link: WeakLink, tmp_path: Path, state: LinkState
) -> None:
    config_file = at_agent(configured(tmp_path), link.address)
    port = load_config(config_file).engine.port
    serve = started(config_file)
    engines = agent.engine_ids()
    link.become(state)
    deadline = time.monotonic() + BEYOND_THE_LEASE_S
    while time.monotonic() < deadline:
        assert served_seqs(port) == 2
        time.sleep(0.1)
    link.become(LinkState.WHOLE)
    wait_for(lambda: lease_left_s(agent) > 0, "the lease is renewed", 30)
    assert agent.engine_ids() == engines
    ended(serve, signal.SIGTERM)


def test_a_link_that_is_cut_in_a_window_ends_it_and_the_service_is_back(
    slow_agent: AgentProcess, tmp_path: Path
) -> None:
    link = WeakLink(tmp_path / "link.sock", slow_agent.socket)
    config_file = at_agent(configured(tmp_path), link.address)
    config, port = load_config(config_file), load_config(config_file).engine.port
    serve = started(config_file)
    asked = retune(config_file)
    tuning(config)
    link.become(LinkState.CUT)
    back_within(port, 2, 30)
    link.become(LinkState.WHOLE)
    asked.communicate(timeout=120)
    wait_for(lambda: state_of(config) == "serving", "serving")
    assert served_seqs(port) == 2
    statuses = [trial.status for trial in Journal(config.state, read_only=True).trials()]
    assert "crashed" not in statuses
    ended(serve, signal.SIGTERM)


def test_a_slow_link_is_sound(agent: AgentProcess, link: WeakLink, tmp_path: Path) -> None:
    config_file = at_agent(configured(tmp_path, budget=1), link.address)
    config, port = load_config(config_file), load_config(config_file).engine.port
    serve = started(config_file)
    link.delay_s = 0.1  # each way; the campaign has two seconds
    asked = retune(config_file)
    wait_for(lambda: len(Journal(config.state, read_only=True).trials()) >= 1, "a trial", 60)
    wait_for(lambda: Journal(config.state, read_only=True).trials()[0].result is not None, "a result", 120)
    link.delay_s = 0.0
    assert Journal(config.state, read_only=True).trials()[0].status == "feasible"
    serve.send_signal(signal.SIGTERM)
    asked.communicate(timeout=60)
    serve.communicate(timeout=60)
    back_within(port, 2, 30)


def test_a_stale_sidecar_is_fenced(agent: AgentProcess, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    first = at_agent(configured(folders[0]), agent.address)
    port = load_config(first).engine.port
    second = at_agent(configured(folders[1], incumbent=4), agent.address, port=port)
    stale = started(first)
    refused = sloguard("serve", "-c", second)
    assert refused.returncode == 1
    assert "the sidecar of another state folder has the agent" in refused.stderr + refused.stdout
    stale.send_signal(signal.SIGSTOP)
    time.sleep(BEYOND_THE_LEASE_S)
    new = started(second)
    assert served_seqs(port) == 4
    engines = agent.engine_ids()
    stale.send_signal(signal.SIGCONT)
    time.sleep(2)  # it would look at its engine four times
    assert (served_seqs(port), agent.engine_ids()) == (4, engines)
    stale.kill()
    output, _ = stale.communicate()
    assert "the sidecar of another state folder has the agent" in output
    ended(new, signal.SIGTERM)


def test_a_frozen_host_is_back_soon_after_it_thaws(slow_agent: AgentProcess, tmp_path: Path) -> None:
    config_file = at_agent(configured(tmp_path), slow_agent.address)
    config, port = load_config(config_file), load_config(config_file).engine.port
    serve = started(config_file)
    asked = retune(config_file)
    tuning(config)
    frozen = [*slow_agent.engine_pids(), slow_agent.pid]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(BEYOND_THE_LEASE_S)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)

    wait_for(lambda: served_seqs(port), "the service is back", 30)
    asked.communicate(timeout=120)
    wait_for(lambda: state_of(config) == "serving", "serving")
    trials = Journal(config.state, read_only=True).trials()
    assert not [trial for trial in trials if trial.result is not None and trial.result.crash is not None]
    ended(serve, signal.SIGTERM)
