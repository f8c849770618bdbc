"""The plugin inside real vLLM."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from statistics import median

import psutil
import pytest
from engine_bench import DEMO, INCUMBENT, Bench, bench, write_config

from sidecar.config.schema import Workload
from sidecar.engine.engine import Engine, Launch
from sidecar.measure.measurement import measure
from sidecar.measure.requests import LoadResult
from sidecar.record.journal import Journal
from sidecar.record.trial import Plan, Role
from sidecar.run.judging import judged_result, load_schedule
from sidecar.search.contract import Proposal
from vllm_sloguard.agent.ports import any_free_port
from vllm_sloguard.crash import Category
from vllm_sloguard.guard.start_history import read_history
from vllm_sloguard.wire import telemetry_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

START_TIMEOUT_S = 300.0
PHASES = (
    pb.PHASE_PLUGIN_LOADED,
    pb.PHASE_CONFIG_READY,
    pb.PHASE_MODEL_LOADED,
    pb.PHASE_KV_CACHE_READY,
    pb.PHASE_ENGINE_READY,
)


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One sidecar for the tests of this module."""
    folder = tmp_path_factory.mktemp("plugin")
    with bench(write_config(folder, model=slower_model(folder), workload={"requests": 200, "rate": 10})) as parts:
        yield parts


def slower_model(folder: Path) -> str:
    """The demo's model with 12 million parameters: its latencies are large against what a client adds to them."""
    model = folder / "model"
    shutil.copytree(DEMO / "model", model)
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    (model / "config.json").write_text(json.dumps(config))
    return str(model)


@pytest.fixture(scope="module")
def engine(sidecar: Bench) -> Generator[Engine]:
    """An engine whose arguments vLLM would refuse: fewer batched tokens than sequences."""
    args = {**INCUMBENT, "max-num-seqs": 128, "max-num-batched-tokens": 8}
    launch = sidecar.engines.serving_launch({name.replace("-", "_"): value for name, value in args.items()})
    started = sidecar.engines.begin(launch, "serving", fork=False)[0]
    started.wait_ready(START_TIMEOUT_S, lambda: False)
    yield started
    sidecar.engines.end(started, drain=True)
    assert started.group.members() == []


def send_load(sidecar: Bench, engine: Engine, workload: Workload | None = None) -> LoadResult:
    """``workload``, or the first of the configuration's, on ``engine``."""
    config = sidecar.config
    workload = workload or config.workload.model_copy(update={"requests": 40})
    return sidecar.runner.client.run(workload, engine.http.base_url, engine.http.model(), config.model, lambda: False)


def sent(load: LoadResult) -> int:
    """How many requests the engine was sent."""
    return len(load.requests) + load.warm_up.requests


def reported(sidecar: Bench, engine: Engine, expected: int) -> int:
    """How many requests the telemetry reports; waits up to a minute for ``expected``."""
    telemetry = sidecar.hub.of(engine.launch.engine_id)
    deadline = time.monotonic() + 60
    while len(telemetry.requests) < expected and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(telemetry.requests)


def test_an_engine_core_killed_under_load_is_a_crash_with_evidence(sidecar: Bench) -> None:
    def kill_under_load() -> None:
        journal = Journal(sidecar.config.state, read_only=True)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            for record in journal.engines():
                steps = sidecar.hub.of(record.identity.engine_id)
                if record.role == "trial" and len(steps.requests) > 20:
                    children = psutil.Process(record.identity.pid).children()
                    core = next(c for c in children if "resource_tracker" not in " ".join(c.cmdline()))
                    core.kill()
                    return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_under_load)
    killer.start()
    proposal = Proposal({"max_num_seqs": 8}, "test", "killed under load")
    args = {name.replace("-", "_"): value for name, value in INCUMBENT.items()}
    plan = Plan(Role.SEARCH, dict(proposal.config), {**args, **proposal.config}, proposal.phase, proposal.reason)
    schedule = load_schedule(sidecar.config, plan.role)
    result = judged_result(sidecar.runner.run(plan, schedule, lambda: False), plan.role, sidecar.config)
    killer.join()

    assert result.measurement is None
    assert result.crash is not None
    assert result.crash.category is Category.ENGINE_DEATH
    assert result.crash.phase == "serving"
    assert "engine core exited unexpectedly" in result.crash.evidence
    assert sidecar.journal.engines() == []


def test_an_invalid_argument_is_repaired_before_the_engine_starts(sidecar: Bench, engine: Engine) -> None:
    telemetry = sidecar.hub.of(engine.launch.engine_id)
    assert telemetry.repair is not None
    changes = {change.name: change for change in telemetry.repair.changes}
    change = changes["max_num_batched_tokens"]
    assert (change.from_value, int(change.to_value)) == ("8", 128)
    assert "max_num_seqs" in change.reason
    assert f"max_num_batched_tokens: 8 → {change.to_value}" in engine.launch.log.read_text(errors="replace")


def test_every_process_dumps_its_stacks_and_continues(engine: Engine) -> None:
    missing = {"monitor_engine_cores", "run_busy_loop", "worker_busy_loop"}
    deadline = time.monotonic() + 60
    while missing and time.monotonic() < deadline:  # where the machine is busy, one writes into another's lines
        engine.group.show_stacks()
        log = engine.launch.log.read_text(errors="replace")
        missing = {where for where in missing if f" in {where}\n" not in log}
    assert missing == set()
    engine.probe(60)


def test_every_phase_of_the_start_is_reported_in_its_order(sidecar: Bench, engine: Engine) -> None:
    telemetry = sidecar.hub.of(engine.launch.engine_id)
    reached = [telemetry.phases[phase] for phase in PHASES]
    assert reached == sorted(reached)
    assert telemetry.kv_cache_tokens
    assert f"KV cache size: {telemetry.kv_cache_tokens:,} tokens" in engine.launch.log.read_text(errors="replace")


def test_reported_memory_is_kept_for_the_next_start(sidecar: Bench, engine: Engine) -> None:
    memory = sidecar.hub.of(engine.launch.engine_id).memory
    assert memory is not None
    assert memory.vllm_version.startswith("0.32")
    sidecar.engines.learn(engine.launch)
    start = read_history(sidecar.learning.path, sidecar.config.model).starts[-1]
    assert start.kv_bytes == memory.kv_cache_bytes == engine.launch.args["kv_cache_memory_bytes"]
    assert start.kv_tokens == sidecar.hub.of(engine.launch.engine_id).kv_cache_tokens


def test_latencies_agree_with_the_clients(sidecar: Bench, engine: Engine) -> None:
    # Long prompts, few at once: the client adds some milliseconds to hundreds on a machine of two cores.
    changes = {"requests": 15, "rate": 1.0, "input_tokens": 700, "spread": 0.0}
    workload = sidecar.config.workload.model_copy(update=changes)
    time.sleep(7)  # telemetry of the probes before arrives within five seconds
    known = len(sidecar.hub.of(engine.launch.engine_id).requests)
    # The first load warms up what the warm-up requests do not.
    first = send_load(sidecar, engine, workload.model_copy(update={"requests": 5}))
    known += sent(first)
    assert reported(sidecar, engine, known) == known

    apart: list[str] = []
    for seed in range(1, 6):
        load = send_load(sidecar, engine, workload.model_copy(update={"seed": seed}))
        known += sent(load)
        assert reported(sidecar, engine, known) == known
        requests = list(sidecar.hub.of(engine.launch.engine_id).requests)[-len(load.requests) :]
        check_parts(requests)
        assert measure(load, sidecar.config.slo).failed == 0
        # Medians: one stall of the machine between the two does not count.
        ours = [1000 * median(part) for part in zip(*((r.ttft_seconds, r.e2e_seconds) for r in requests), strict=True)]
        seen = [(r.ttft_s, r.e2e_s) for r in load.requests if r.ttft_s is not None and r.e2e_s is not None]
        client = [1000 * median(part) for part in zip(*seen, strict=True)]
        both = f"TTFT {ours[0]:.1f} ms, client {client[0]:.1f}; E2E {ours[1]:.1f}, client {client[1]:.1f}"
        print(both)
        if ours == pytest.approx(client, rel=0.10, abs=5):
            return
        # Other processes of the machine delay the client alone: one undisturbed load is enough.
        apart.append(both)
    pytest.fail(f"the telemetry and the client are apart: {apart}")


def check_parts(requests: list[pb.RequestFinished]) -> None:
    """Asserts that the parts of each request's time are no longer than its E2E latency."""
    for request in requests:
        parts = request.queue_seconds + request.prefill_seconds + request.decode_seconds
        assert parts <= request.e2e_seconds + 0.01
        assert request.finish_reason == "length"
        assert request.prompt_tokens > 0


def test_the_engine_serves_without_its_sidecar(sidecar: Bench, engine: Engine) -> None:
    """The sidecar is stopped, then frozen with its socket open, then gone. Last on this engine: it ends the sidecar."""
    socket = sidecar.config.socket
    sidecar.server.stop(0).wait()
    assert measure(send_load(sidecar, engine), sidecar.config.slo).failed == 0

    script = Path(__file__).parents[1] / "support" / "silent_sidecar.py"
    with subprocess.Popen([sys.executable, str(script), str(socket)], stdout=subprocess.PIPE, text=True) as silent:
        assert silent.stdout is not None
        assert silent.stdout.readline() == "ready\n"
        engine.probe(120)
        time.sleep(6)  # longer than the plugin's longest pause: it connects
        silent.send_signal(signal.SIGSTOP)
        assert measure(send_load(sidecar, engine), sidecar.config.slo).failed == 0
        silent.kill()
    socket.unlink(missing_ok=True)
    assert measure(send_load(sidecar, engine), sidecar.config.slo).failed == 0
    assert engine.alive()


def test_a_bad_plugin_setting_leaves_vllm_as_it_is(sidecar: Bench, tmp_path: Path) -> None:
    args = {name.replace("-", "_"): value for name, value in INCUMBENT.items()}
    env = {**sidecar.config.engine.env, "SLOGUARD_REPAIR": "perhaps"}
    launch = Launch(
        "alone", sys.executable, sidecar.config.model, args, "127.0.0.1", any_free_port(), env, tmp_path / "engine.log"
    )
    engine = Engine.start(launch)
    try:
        engine.wait_ready(START_TIMEOUT_S, lambda: False)
        assert engine.http.complete("a", 4, 120)
        # A bad setting is one clear line, and the plugin steps aside.
        assert "SLOGUARD_REPAIR: 'perhaps' is not on or off" in engine.launch.log.read_text(errors="replace")
    finally:
        engine.stop()
    assert engine.group.members() == []
