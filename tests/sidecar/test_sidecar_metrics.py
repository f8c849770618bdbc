"""What Prometheus reads, over real HTTP and through Prometheus' own parser."""

import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sidecar_cases import configured, measured, oom, planned, served, trial

from sidecar.metrics import Metrics
from sidecar.promotion import Decision, Outcome
from sidecar.states import State
from sidecar.telemetry import EngineTelemetry
from sidecar.trial import Change, Result, Role
from vllm_sloguard.wire import telemetry_pb2 as pb

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Page:
    def __init__(self, metrics: Metrics, url: str) -> None:
        self.metrics = metrics
        self.url = url

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def value(self, name: str, **labels: str) -> float | None:
        status, text = self.get("/metrics")
        assert status == 200
        found = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) <= 1
        return found[0] if found else None


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    config = configured(tmp_path, "metrics.port", 0)
    config = config.model_copy(update={"slo": config.slo.model_copy(update={"ttft_p99_ms": 123.0})})
    metrics = Metrics(config)
    server = metrics.serve()
    yield Page(metrics, f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    server.server_close()


def heard(metrics: Metrics, *events: pb.Event, engine_id: str = "one") -> None:
    metrics.heard(pb.PublishRequest(engine_id=engine_id, events=events), EngineTelemetry())


def finished(ttft_s: float) -> pb.Event:
    return pb.Event(request_finished=pb.RequestFinished(ttft_seconds=ttft_s, e2e_seconds=1.0, finish_reason="stop"))


def test_ready_only_while_it_serves(page: Page) -> None:
    assert page.get("/ready")[0] == 503

    page.metrics.entered(State.SERVING, ready=True)
    assert page.get("/ready")[0] == 200
    assert page.value("sloguard_state", sloguard_state="serving") == 1

    page.metrics.entered(State.DRAINING, ready=False)
    assert page.get("/ready")[0] == 503
    assert page.value("sloguard_state", sloguard_state="serving") == 0
    assert page.value("sloguard_state", sloguard_state="draining") == 1


def test_no_other_page(page: Page) -> None:
    assert page.get("/")[0] == 404
    assert page.get("/metrics/more")[0] == 404


def test_limit_of_the_slo_is_a_bucket(page: Page) -> None:
    page.metrics.traffic("one", "serving")

    # At the limit, and just above it.
    heard(page.metrics, finished(0.123), finished(0.1231))

    assert page.value("sloguard_slo_limit_seconds", latency="ttft") == 0.123
    assert page.value("sloguard_request_ttft_seconds_bucket", traffic="serving", le="0.123") == 1
    assert page.value("sloguard_request_ttft_seconds_count", traffic="serving") == 2
    assert not page.value("sloguard_request_itl_seconds_count", traffic="serving")


def test_traffic_of_trials_and_of_serving_is_apart_and_strangers_are_not_counted(page: Page) -> None:
    page.metrics.traffic("one", "serving")
    page.metrics.traffic("two", "trial")

    heard(page.metrics, finished(0.1))
    heard(page.metrics, finished(0.1), finished(0.1), engine_id="two")
    heard(page.metrics, finished(0.1), engine_id="stranger")

    assert page.value("sloguard_requests_total", traffic="serving", finish_reason="stop") == 1
    assert page.value("sloguard_requests_total", traffic="trial", finish_reason="stop") == 2


def test_levels_are_the_last_ones_and_counters_are_summed(page: Page) -> None:
    page.metrics.traffic("one", "serving")
    for running in (5, 3):
        stats = pb.StepStats(running_requests=running, waiting_requests=1, kv_cache_usage=0.5, preemptions=2)
        heard(page.metrics, pb.Event(step_stats=stats))
    telemetry = EngineTelemetry(dropped={1: 3, 2: 4}, hook_errors={1: 1})
    page.metrics.heard(pb.PublishRequest(engine_id="one"), telemetry)

    assert page.value("sloguard_engine_running_requests", traffic="serving") == 3
    assert page.value("sloguard_engine_preemptions_total", traffic="serving") == 4
    assert page.value("sloguard_telemetry_dropped_events", traffic="serving") == 7
    assert page.value("sloguard_plugin_hook_errors", traffic="serving") == 1


def test_estimate_and_report_of_the_kv_cache(page: Page) -> None:
    page.metrics.traffic("one", "trial")
    phase = pb.PhaseReached(phase=pb.PHASE_KV_CACHE_READY, kv_cache_tokens=4096)
    heard(page.metrics, pb.Event(phase_reached=phase))
    heard(page.metrics, pb.Event(repair_report=pb.RepairReport(predicted_kv_cache_tokens=4000)))

    assert page.value("sloguard_kv_cache_tokens", source="reported") == 4096
    assert page.value("sloguard_kv_cache_tokens", source="predicted") == 4000


def test_trials(page: Page) -> None:
    base = trial(1, planned(Role.BASELINE), served(-100.0))
    best = trial(2, planned(changes=(Change("max_num_seqs", 9, 8, "memory"),)), served(-50.0))
    failing = Result(violation=1, value=-70.0, measurement=measured(math.inf))
    rest = [
        trial(3, planned(), Result(crash=oom())),
        trial(4, planned(refusal="no"), None),
        trial(5, planned(), None),
        trial(6, planned(), failing),
    ]
    trials = [base, best, *rest]
    for index, each in enumerate(trials):
        page.metrics.trial(each, trials[: index + 1])

    counted = {s: page.value("sloguard_trials_total", status=s) for s in ("feasible", "crashed", "refused", "aborted")}
    assert counted == {"feasible": 2, "crashed": 1, "refused": 1, "aborted": 1}
    assert page.value("sloguard_crashes_total", category="out_of_memory", phase="starting", traffic="trial") == 1
    assert page.value("sloguard_repairs_total", argument="max_num_seqs") == 1
    assert page.value("sloguard_budget_remaining_trials") == 15 - 4
    assert page.value("sloguard_trial_objective", trial="baseline") == -100
    assert page.value("sloguard_trial_objective", trial="best") == -50
    assert page.value("sloguard_trial_objective", trial="last") == -70
    assert page.value("sloguard_trial_p99_seconds", trial="last", latency="ttft") == math.inf
    assert page.value("sloguard_trial_p99_seconds", trial="best", latency="ttft") == 0.01


def test_a_trial_that_runs_is_not_counted(page: Page) -> None:
    running = trial(1, planned(), None, ended_at=None)
    page.metrics.trial(running, [running])

    assert page.value("sloguard_trials_total", status="aborted") == 0


def test_decisions(page: Page) -> None:
    page.metrics.decided(Decision(Outcome.KEPT, "", 1))

    assert page.value("sloguard_decisions_total", outcome="kept") == 1
    assert page.value("sloguard_decisions_total", outcome="promoted") == 0


def test_any_argument_of_vllm_can_be_shown(page: Page) -> None:
    page.metrics.serving({"max_num_seqs": 8, "compilation_config.mode": 3, "served_model_name": ['a "b"\n']})

    assert page.value("sloguard_serving_configuration_info", max_num_seqs="8") == 1
