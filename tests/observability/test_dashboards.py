"""The dashboard, the alerts and the scrape file: fresh, correct, and fed by what the sidecar really exposes."""

import math
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import grpc
import pytest
import yaml
from prometheus_server import BINARY, PrometheusServer, panel_queries

from sidecar.config import Config, MetricsConfig, Slo, load
from sidecar.judge import Measurement
from sidecar.metrics import Metrics
from sidecar.promotion import Decision, Outcome
from sidecar.states import State
from sidecar.telemetry import TelemetryHub
from sidecar.trial import Change, Plan, Result, Role, Trial
from vllm_sloguard.crash import Category, Crash
from vllm_sloguard.wire import telemetry_pb2 as pb

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "sloguard.json"
PROMTOOL = shutil.which("promtool")
# 3000 ms is a bucket that the client writes as "3.0", 60 ms one that is there for the SLO alone.
SLO = Slo(ttft_p99_ms=500, itl_p99_ms=60, e2e_p99_ms=3000)

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
needs_prometheus = pytest.mark.skipif(BINARY is None, reason="prometheus is not installed (Debian: prometheus)")


def promtool(*args: str, text: str | None = None) -> None:
    """Runs promtool beside the alert rules; any complaint fails the test."""
    assert PROMTOOL is not None
    command, folder = [PROMTOOL, *args], DEPLOY / "prometheus"
    ran = subprocess.run(command, input=text, cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_dashboard_is_what_the_generator_writes() -> None:
    pytest.importorskip("grafana_foundation_sdk")
    generator = DEPLOY / "grafana" / "generate.py"
    ran = subprocess.run(
        [sys.executable, generator, "--check"], capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 0, ran.stderr


@needs_promtool
def test_prometheus_takes_the_scrape_file_and_the_rules() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", "alerts.yml")


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "alerts_test.yml")


# A sidecar's metrics, fed with what a run brings.


@dataclass
class Exposed:
    """Metrics that are served at ``address``, behind the hub that plugins report to."""

    metrics: Metrics
    hub: TelemetryHub
    address: str
    batches: int = 0

    def publish(self, *events: pb.Event) -> None:
        """A batch of each of two engines: the one that serves, and a trial's."""
        self.batches += 1
        for pid, engine_id in enumerate(("served", "tried"), 1):
            process = pb.Process(role=pb.PROCESS_ROLE_API_SERVER, pid=pid)
            request = pb.PublishRequest(engine_id=engine_id, process=process, sequence=self.batches, events=events)
            request.dropped_events = self.batches // 3
            # The context is for refusals alone.
            self.hub.Publish(request, cast(grpc.ServicerContext, None))

    def page(self) -> str:
        with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=10) as answer:
            return answer.read().decode()


@pytest.fixture
def exposed() -> Iterator[Exposed]:
    config = load(DEPLOY / "demo" / "sloguard.yaml")
    config = config.model_copy(update={"metrics": MetricsConfig(port=0), "slo": SLO})
    metrics = Metrics(config)
    server = metrics.serve()
    host, port = server.server_address[:2]
    served = Exposed(metrics, TelemetryHub(metrics.heard), f"{host!s}:{port}")
    begin(served, config)
    yield served
    server.shutdown()
    server.server_close()


def begin(exposed: Exposed, config: Config) -> None:
    """What precedes a run: two engines, one of them serving."""
    metrics = exposed.metrics
    metrics.entered(State.STARTING, ready=False)
    for engine_id, role in (("served", "serving"), ("tried", "trial")):
        exposed.hub.expect(engine_id)
        metrics.traffic(engine_id, role)
    metrics.serving({**config.engine.args, "max_num_seqs": 2})
    metrics.engine_up.set(1)
    metrics.seconds.labels("restore").set(31.5)
    metrics.entered(State.SERVING, ready=True)
    report = pb.RepairReport(predicted_kv_cache_tokens=262_144)
    ready = pb.PhaseReached(phase=pb.PHASE_KV_CACHE_READY, kv_cache_tokens=261_120)
    exposed.publish(pb.Event(repair_report=report), pb.Event(phase_reached=ready))


def a_second(number: int) -> list[pb.Event]:
    """One second's telemetry: of ten requests, one is over each limit of SLO."""
    good = pb.RequestFinished(ttft_seconds=0.04, inter_token_seconds=0.011, e2e_seconds=0.6, finish_reason="stop")
    slow = pb.RequestFinished(ttft_seconds=0.7, inter_token_seconds=0.08, e2e_seconds=4.0, finish_reason="length")
    steps = pb.StepStats(
        running_requests=2 + number % 3, waiting_requests=number % 5, kv_cache_usage=0.1 * (number % 8), preemptions=1
    )
    requests = [pb.Event(request_finished=request) for request in [good] * 9 + [slow]]
    return [*requests, pb.Event(step_stats=steps)]


MEASURED = Measurement(
    requests=100,
    failed=0,
    duration_s=8.4,
    ttft_p99_ms=212.0,
    itl_p99_ms=31.0,
    e2e_p99_ms=1210.0,
    ttft_mean_ms=61.0,
    e2e_mean_ms=540.0,
    goodput_rps=11.9,
)
FEASIBLE = Result(value=-540.0, measurement=MEASURED, kv_cache_tokens=261_120, start_s=14.0, load_s=8.4, stop_s=1.1)


def trial(number: int, result: Result | None, *, role: Role = Role.SEARCH, refusal: str = "") -> Trial:
    change = Change("max_num_batched_tokens", 512, 1024, "at least max_model_len without chunked prefill")
    args: dict[str, bool | int | float | str | list[str]] = {"max_num_seqs": 16, "max_num_batched_tokens": 1024}
    plan = Plan(role, {"max_num_seqs": 16}, args, "explore", "a test", (change,), refusal)
    return Trial(1, number, plan, 1_800_000_000.0, 1_800_000_030.0, result)


def a_run() -> list[Trial]:
    """A run in which everything happens once."""
    slow = replace(MEASURED, ttft_p99_ms=911.0, e2e_p99_ms=math.inf, failed=2)
    out_of_memory = Crash(Category.OUT_OF_MEMORY, "CUDA out of memory", "EngineCore", "starting", 1)
    death = Crash(Category.ENGINE_DEATH, "exit code -9", "", "serving", -9)
    return [
        trial(1, FEASIBLE, role=Role.BASELINE),
        trial(2, Result(crash=out_of_memory)),
        trial(3, None, refusal="a KV cache of 64 TiB does not fit"),
        trial(4, replace(FEASIBLE, violation=0.8, value=-1400.0, measurement=slow)),
        trial(5, Result(crash=death, start_s=14.0)),
        trial(6, replace(FEASIBLE, value=-320.0)),
    ]


def run_for_seconds(exposed: Exposed) -> None:
    """A window, a trial a second, with telemetry; it ends in a promotion."""
    trials, metrics = a_run(), exposed.metrics
    metrics.entered(State.DRAINING, ready=False)
    metrics.seconds.labels("drain").set(2.5)
    metrics.entered(State.TUNING, ready=False)
    for number, ended in enumerate(trials, 1):
        exposed.publish(*a_second(number))
        metrics.window_remaining.set(1800 - number)
        metrics.trial(ended, trials[:number])
        time.sleep(1)
    metrics.crashed(Crash(Category.TIMEOUT, "no answer", "", "starting", None), "serving")
    metrics.decided(Decision(Outcome.PROMOTED, "better", 6, 0.4, 0.001))
    metrics.entered(State.SERVING, ready=True)
    exposed.publish(*a_second(0))
    time.sleep(1.5)


@needs_promtool
def test_the_metrics_page_is_clean(exposed: Exposed) -> None:
    exposed.publish(*a_second(1))
    for number, ended in enumerate(trials := a_run(), 1):
        exposed.metrics.trial(ended, trials[:number])
    promtool("check", "metrics", text=exposed.page())


@needs_prometheus
def test_every_panel_shows_data(exposed: Exposed) -> None:
    queries = panel_queries(DASHBOARD)
    assert len(queries) > 30
    with PrometheusServer(exposed.address) as prometheus:
        prometheus.wait_until_up()
        run_for_seconds(exposed)
        empty = [query for query in queries if not has_numbers(prometheus, query)]
        assert not empty

        # And the data are right.
        attained = [query for query in queries if "count_values" in query]
        assert [numbers(prometheus, query) for query in attained] == [[pytest.approx(0.9)]] * 3
        assert by_label(prometheus, one(queries, "trials_total"), "status") == {
            "feasible": 2,
            "infeasible": 1,
            "crashed": 2,
            "refused": 1,
            "aborted": 0,
        }
        assert numbers(prometheus, one(queries, r"sloguard_state\{")) == [2]  # serving
        crashes = by_label(prometheus, one(queries, "crashes_total"), "category")
        assert {name for name, count in crashes.items() if count} == {"out_of_memory", "engine_death", "timeout"}
        assert_rules_fit(prometheus)
        (info,) = prometheus.query(one(queries, "configuration_info"))
        assert info["metric"]["max_num_seqs"] == "2"


def assert_rules_fit(prometheus: PrometheusServer) -> None:
    """The alerts' inputs: the SLO's buckets are found, and every metric that is named exists."""
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    rules: list[dict[str, str]] = [rule for group in groups for rule in group["rules"]]
    recorded = {rule["record"]: rule["expr"] for rule in rules if "record" in rule}
    within = by_label(prometheus, recorded["sloguard:requests_within_slo:total"], "latency")
    measured = by_label(prometheus, recorded["sloguard:requests_measured:total"], "latency")
    assert within == {name: pytest.approx(0.9 * count) for name, count in measured.items()}
    assert set(measured) == {"ttft", "itl", "e2e"}
    named = {name for rule in rules for name in re.findall(r"\bsloguard_\w+(?=[\s{[)])", rule["expr"])}
    assert len(named) >= 5
    assert [name for name in named if not prometheus.query(name)] == []


def numbers(prometheus: PrometheusServer, query: str) -> list[float]:
    return [float(sample["value"][1]) for sample in prometheus.query(query)]


def has_numbers(prometheus: PrometheusServer, query: str) -> bool:
    return any(not math.isnan(number) for number in numbers(prometheus, query))


def by_label(prometheus: PrometheusServer, query: str, label: str) -> dict[str, float]:
    return {sample["metric"][label]: float(sample["value"][1]) for sample in prometheus.query(query)}


def one(queries: list[str], pattern: str) -> str:
    (found,) = {query for query in queries if re.search(pattern, query)}
    return found
