"""The metrics over real HTTP, parsed with Prometheus' parser."""

import math
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from engine_bench import write_config
from prometheus_client.parser import text_string_to_metric_families
from sidecar_cases import configured, measured, oom, planned, served, trial

from sidecar import http_server
from sidecar.config.schema import load_config
from sidecar.metrics import docs_page
from sidecar.metrics.exporter import Metrics
from sidecar.observe.telemetry import EngineTelemetry
from sidecar.record.decisions import Decision, NearestMiss, Outcome
from sidecar.record.journal import Journal
from sidecar.record.states import Cause, State
from sidecar.record.trial import RepairChange, Result, Role
from sidecar.service.mailbox import Mailbox
from sidecar.service.state_machine import StateMachine
from vllm_sloguard.latency import GapHistogram
from vllm_sloguard.wire import telemetry_pb2 as pb


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Page:
    def __init__(self, metrics: Metrics, clock: Clock, url: str) -> None:
        self.metrics = metrics
        self.clock = clock
        self.url = url

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=60) as response:
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
    clock = Clock()
    metrics = Metrics(config, clock)
    server = metrics.serve(print)
    yield Page(metrics, clock, server.url)
    server.stop()


def heard(metrics: Metrics, *events: pb.Event, engine_id: str = "one") -> None:
    engine = EngineTelemetry()
    for event in events:
        engine.add(event)
    metrics.on_events(pb.PublishRequest(engine_id=engine_id, events=events), engine)


def finished(ttft_s: float, reason: str = "stop", prompt_tokens: int = 100) -> pb.Event:
    request = pb.RequestFinished(
        ttft_seconds=ttft_s, e2e_seconds=1.0, finish_reason=reason, prompt_tokens=prompt_tokens, output_tokens=1
    )
    return pb.Event(request_finished=request)


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


def test_a_stall_shows_in_itl_and_not_in_tpot(page: Page) -> None:
    page.metrics.traffic("one", "serving")
    gaps = GapHistogram()
    gaps.add(0.004, 990)
    gaps.add(2.0, 10)
    step = pb.StepStats(gap_buckets=list(gaps.counts), gap_counts=list(gaps.counts.values()))
    request = pb.RequestFinished(inter_token_seconds=0.024, e2e_seconds=3.0, prompt_tokens=9, output_tokens=99)
    heard(page.metrics, pb.Event(step_stats=step), pb.Event(request_finished=request))

    def within(latency: str, le: str) -> float | None:
        return page.value(f"sloguard_request_{latency}_seconds_bucket", traffic="serving", le=le)

    assert (within("itl", "0.005"), within("itl", "1.0"), within("itl", "+Inf")) == (990, 990, 1000)
    assert (within("tpot", "0.02"), within("tpot", "0.05")) == (0, 1)
    assert page.value("sloguard_request_itl_seconds_sum", traffic="serving") == pytest.approx(24, rel=0.02)
    page.metrics.serving({"max_num_seqs": 4})
    page.metrics.serving({"max_num_seqs": 8})
    assert within("itl", "+Inf") == 0


def test_requests_that_clients_abort_count_once_they_have_waited_too_long(page: Page) -> None:
    page.metrics.traffic("one", "serving")
    late = pb.RequestFinished(e2e_seconds=9.0, finish_reason="abort", prompt_tokens=9)
    early = pb.RequestFinished(e2e_seconds=0.01, finish_reason="abort", prompt_tokens=9)
    rejected = pb.RequestFinished(finish_reason="rejected", prompt_tokens=9)
    heard(page.metrics, *(pb.Event(request_finished=each) for each in (late, early, rejected)))

    assert page.value("sloguard_aborted_requests_total", abort="after_limit") == 1
    assert page.value("sloguard_aborted_requests_total", abort="within_limits") == 1
    assert page.value("sloguard_requests_total", traffic="serving", finish_reason="rejected") == 1
    assert page.value("sloguard_slo_misses_total", objective="any") == 2
    assert page.value("sloguard_slo_requests_total", objective="any") == 2


def test_whether_the_current_configuration_meets_the_slo(page: Page) -> None:
    def meets() -> float | None:
        return page.value("sloguard_current_configuration_meets_slo")

    assert math.isnan(meets() or 0.0)
    page.metrics.serving({"max_num_seqs": 2})
    missed = trial(1, planned(Role.BASELINE), Result(violation=0.5, measurement=measured(900.0)))
    page.metrics.trial(missed, [missed])
    assert meets() == 0
    again = trial(2, planned(Role.REFERENCE), served(-80.0))
    page.metrics.trial(again, [missed, again])
    assert meets() == 1
    page.metrics.serving({"max_num_seqs": 4})
    assert math.isnan(meets() or 0.0)


def test_traffic_of_trials_and_of_serving_is_apart_and_strangers_are_not_counted(page: Page) -> None:
    page.metrics.traffic("one", "serving")
    page.metrics.traffic("two", "trial")

    heard(page.metrics, finished(0.1))
    heard(page.metrics, finished(0.1), finished(0.1), engine_id="two")
    heard(page.metrics, finished(0.1), engine_id="stranger")

    assert page.value("sloguard_requests_total", traffic="serving", finish_reason="stop") == 1
    assert page.value("sloguard_requests_total", traffic="trial", finish_reason="stop") == 2


def test_the_slo_is_judged_by_what_users_sent(page: Page) -> None:
    page.metrics.traffic("one", "serving")
    page.metrics.traffic("two", "trial")

    # Met, missed, failed, aborted late; then one aborted early, and the sidecar's probe, which do not count.
    heard(page.metrics, finished(0.1), finished(0.2), finished(0.1, "error"), finished(9, "abort"))
    heard(page.metrics, finished(0.1, "abort"), finished(9, "stop", 2))
    heard(page.metrics, finished(9), engine_id="two")

    judged = {name: page.value("sloguard_slo_requests_total", objective=name) for name in ("ttft", "errors", "any")}
    missed = {name: page.value("sloguard_slo_misses_total", objective=name) for name in ("ttft", "errors", "any")}
    assert judged == {"ttft": 4, "errors": 4, "any": 4}
    assert missed == {"ttft": 2, "errors": 1, "any": 3}
    assert page.value("sloguard_slo_error_budget_ratio", objective="ttft") == 0.01
    assert page.value("sloguard_slo_requests_total", objective="itl") is None  # it has no limit


def test_another_configuration_starts_at_zero(page: Page) -> None:
    page.metrics.traffic("one", "serving")
    page.metrics.serving({"max_num_seqs": 8})
    heard(page.metrics, finished(0.2))

    page.metrics.serving({"max_num_seqs": 8})  # the same, after a crash
    assert page.value("sloguard_slo_misses_total", objective="any") == 1
    assert page.value("sloguard_request_ttft_seconds_count", traffic="serving") == 1

    page.metrics.serving({"max_num_seqs": 16}, promotion=3)
    assert page.value("sloguard_slo_misses_total", objective="any") == 0
    assert page.value("sloguard_request_ttft_seconds_count", traffic="serving") == 0
    assert page.value("sloguard_requests_total", traffic="serving", finish_reason="stop") == 1
    assert page.value("sloguard_serving_configuration_info", promotion="3", max_num_seqs="16") == 1


def test_levels_are_the_last_ones_and_counters_are_summed(page: Page) -> None:
    page.metrics.traffic("one", "serving")
    page.metrics.traffic("two", "serving")
    for running in (5, 3):
        stats = pb.StepStats(running_requests=running, waiting_requests=1, kv_cache_usage=0.5, preemptions=2)
        heard(page.metrics, pb.Event(step_stats=stats))
    # Each engine reports its own running total, from 0.
    for engine_id in ("one", "two", "two"):
        page.metrics.on_events(pb.PublishRequest(engine_id=engine_id), EngineTelemetry(dropped={1: 3, 2: 4}))
    page.metrics.on_events(
        pb.PublishRequest(engine_id="one"), EngineTelemetry(dropped={1: 5, 2: 4}, hook_errors={1: 1})
    )

    assert page.value("sloguard_engine_running_requests", traffic="serving") == 3
    assert page.value("sloguard_engine_preemptions_total", traffic="serving") == 4
    assert page.value("sloguard_telemetry_dropped_events_total", traffic="serving") == 7 + 7 + 2
    assert page.value("sloguard_plugin_hook_errors_total", traffic="serving") == 1


def test_an_engine_that_has_ended_leaves_no_level(page: Page) -> None:
    for engine_id, traffic in (("one", "serving"), ("two", "trial")):
        page.metrics.traffic(engine_id, traffic)
        stats = pb.StepStats(running_requests=5, waiting_requests=1, kv_cache_usage=0.5)
        heard(page.metrics, pb.Event(step_stats=stats), engine_id=engine_id)

    page.metrics.entered(State.VALIDATING, ready=False)
    assert page.value("sloguard_engine_running_requests", traffic="serving") == 0
    assert page.value("sloguard_engine_running_requests", traffic="trial") == 5

    page.metrics.entered(State.SERVING, ready=True)
    assert page.value("sloguard_engine_running_requests", traffic="trial") == 0
    assert page.value("sloguard_engine_kv_cache_usage_ratio", traffic="trial") == 0


def test_estimate_and_report_of_the_kv_cache(page: Page) -> None:
    page.metrics.traffic("one", "trial")
    engine = EngineTelemetry()
    for event in (
        pb.Event(repair_report=pb.RepairReport(predicted_kv_cache_tokens=4000)),
        pb.Event(phase_reached=pb.PhaseReached(phase=pb.PHASE_KV_CACHE_READY, kv_cache_tokens=4096)),
    ):
        engine.add(event)
        page.metrics.on_events(pb.PublishRequest(engine_id="one", events=[event]), engine)

    assert page.value("sloguard_kv_cache_tokens", source="reported") == 4096
    assert page.value("sloguard_kv_cache_tokens", source="predicted") == 4000
    assert page.value("sloguard_guard_kv_cache_prediction_ratio_count") == 1
    assert page.value("sloguard_guard_kv_cache_prediction_ratio_sum") == 4000 / 4096

    # Nothing is known of the next engine yet.
    page.metrics.traffic("two", "trial")
    assert math.isnan(page.value("sloguard_kv_cache_tokens", source="reported") or 0)


def test_repairs_by_the_rule_that_was_broken(page: Page) -> None:
    page.metrics.traffic("one", "serving")
    inside = pb.Change(name="block_size", rules=["blocks", "not a rule of this version"])
    heard(page.metrics, pb.Event(repair_report=pb.RepairReport(changes=[inside])))
    before = RepairChange("max_num_seqs", 9, 8, "memory", ("blocks", "some-kv"))
    page.metrics.trial(repaired := trial(1, planned(changes=(before,)), served(-50.0)), [repaired])

    counted = {rule: page.value("sloguard_repairs_total", rule=rule) for rule in ("blocks", "some-kv", "other")}
    assert counted == {"blocks": 2, "some-kv": 1, "other": 1}


def test_where_a_window_went(page: Page) -> None:
    def go_on(state: State, after_s: float, cause: Cause | None = None) -> None:
        page.clock.now += after_s
        page.metrics.entered(state, ready=state is State.SERVING, cause=cause)

    go_on(State.SERVING, 0)
    go_on(State.DRAINING, 500)
    go_on(State.TUNING, 4)
    page.clock.now += 2  # the search
    plan, result = planned(Role.BASELINE), Result(start_s=10, warmup_s=3, load_s=14, stop_s=1)
    running = trial(1, plan, None, ended_at=None)
    page.metrics.trial(running, [running])
    page.clock.now += 30
    page.metrics.trial(ended := trial(1, plan, result), [ended])  # of 30 s
    go_on(State.PROMOTING, 5)
    go_on(State.RESTORING, 6)
    go_on(State.SERVING, 7)
    # A crash does not count as a window.
    go_on(State.RESTORING, 100, Cause.ENGINE_CRASHED)
    go_on(State.SERVING, 9)

    activities = ("drain", "decide", "start", "warmup", "load", "stop", "restore")
    spent = {name: page.value("sloguard_window_spent_seconds_total", activity=name) for name in activities}
    assert spent == {"drain": 4, "decide": 2 + 2 + 5, "start": 10, "warmup": 3, "load": 14, "stop": 1, "restore": 13}
    assert page.value("sloguard_drain_duration_seconds_sum") == 4
    assert page.value("sloguard_restore_duration_seconds_sum") == 13 + 9
    assert page.value("sloguard_restore_duration_seconds_bucket", le="10.0") == 1
    assert page.value("sloguard_engine_restarts_total", reason="engine_crashed") == 1
    assert page.value("sloguard_engine_restarts_total", reason="engine_hangs") == 0


def test_a_restart_after_a_window_is_planned(page: Page) -> None:
    for state, cause in (
        (State.SERVING, Cause.STARTED),
        (State.TUNING, Cause.DRAINED),
        (State.PROMOTING, Cause.PROMOTED),
        (State.RESTORING, Cause.PROMOTED),  # the same restart goes on
        (State.SERVING, Cause.PROMOTED),
        (State.TUNING, Cause.DRAINED),
        (State.RESTORING, Cause.KEPT),
        (State.SERVING, Cause.KEPT),
    ):
        page.metrics.entered(state, ready=False, cause=cause)

    planned = {
        reason: page.value("sloguard_engine_planned_restarts_total", reason=reason) for reason in ("promoted", "kept")
    }
    assert planned == {"promoted": 1, "kept": 1}
    assert page.value("sloguard_engine_restarts_total", reason="engine_crashed") == 0


def test_the_next_window_is_that_of_the_schedule(tmp_path: Path) -> None:
    def scheduled(folder: Path, **window: str) -> float | None:
        folder.mkdir()
        config = load_config(write_config(folder, window=window))
        return Metrics(config).registry.get_sample_value("sloguard_next_window_timestamp_seconds")

    found = scheduled(tmp_path / "scheduled", cron="0 3 * * *")
    assert found is not None
    assert 0 < found - time.time() <= 25 * 3600
    assert scheduled(tmp_path / "unscheduled") == 0


def test_a_window_that_is_overrun(page: Page, tmp_path: Path) -> None:
    progress = StateMachine(Journal(tmp_path / "state"), page.metrics, Mailbox(), print)
    assert page.value("sloguard_window_overrun_seconds") == 0

    progress.window_end = time.monotonic() + 600
    assert page.value("sloguard_window_overrun_seconds") == 0
    assert 500 < (page.value("sloguard_window_remaining_seconds") or 0) <= 600

    progress.window_end = time.monotonic() - 600
    assert 600 <= (page.value("sloguard_window_overrun_seconds") or 0) < 700
    assert page.value("sloguard_window_remaining_seconds") == 0


def test_a_window_that_was_refused_took_no_time(page: Page) -> None:
    for state in (State.SERVING, State.DRAINING, State.SERVING):
        page.metrics.entered(state, ready=True)
        page.clock.now += 3

    assert page.value("sloguard_drain_duration_seconds_count") == 0
    assert page.value("sloguard_window_spent_seconds_total", activity="drain") == 0


def test_trials(page: Page) -> None:
    base = trial(1, planned(Role.BASELINE), replace(served(-100.0), measurement=measured(e2e_mean_ms=100.0)))
    best = trial(2, planned(changes=(RepairChange("max_num_seqs", 9, 8, "memory"),)), served(-50.0))
    failing = Result(violation=1, value=-90.0, measurement=measured(math.inf, e2e_mean_ms=90.0))
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
    assert page.value("sloguard_trial_duration_seconds_count", status="feasible") == 2
    assert page.value("sloguard_trial_duration_seconds_sum", status="feasible") == 60
    assert page.value("sloguard_budget_remaining_trials") == 15 - 4
    assert page.value("sloguard_trial_e2e_mean_seconds", trial="incumbent") == 0.1
    assert page.value("sloguard_trial_e2e_mean_seconds", trial="best") == 0.08
    assert page.value("sloguard_trial_e2e_mean_seconds", trial="last") == 0.09
    assert page.value("sloguard_trial_goodput_requests_per_second", trial="best") == 4
    assert page.value("sloguard_trial_p99_seconds", trial="last", latency="ttft") == math.inf
    assert page.value("sloguard_trial_p99_seconds", trial="best", latency="ttft") == 0.01


def test_a_trial_that_runs_is_shown_and_not_counted(page: Page) -> None:
    running = trial(7, planned(), None, ended_at=None)
    page.metrics.trial(running, [running])

    assert page.value("sloguard_trial_number") == 7
    assert page.value("sloguard_trials_total", status="aborted") == 0
    assert page.value("sloguard_budget_remaining_trials") == 15


def test_decisions(page: Page) -> None:
    page.metrics.decided(Decision(Outcome.PROMOTED, "", 1, gain=0.2, low=0.1, high=0.3))
    assert page.value("sloguard_decision_gain_ratio", bound="low") == 0.1

    page.metrics.decided(Decision(Outcome.KEPT, "", 1))
    assert math.isnan(page.value("sloguard_decision_gain_ratio", bound="low") or 0)
    assert page.value("sloguard_decisions_total", outcome="kept") == 1
    assert page.value("sloguard_decisions_total", outcome="promoted") == 1


def test_the_nearest_miss_of_the_last_decision(page: Page) -> None:
    name, rate = "sloguard_nearest_miss_excess_ratio", "sloguard_nearest_miss_highest_rate_requests_per_second"
    miss = NearestMiss(3, "ttft_p99_ms", 0.25, highest_rate=4.0)
    page.metrics.decided(Decision(Outcome.KEPT, "", 1, nearest_miss=miss))
    assert (page.value(name, limit="ttft_p99_ms"), page.value(rate)) == (0.25, 4.0)

    page.metrics.decided(Decision(Outcome.PROMOTED, "", 2))
    assert page.value(name, limit="ttft_p99_ms") is None
    assert math.isnan(page.value(rate) or 0)


def test_any_argument_of_vllm_can_be_shown(page: Page) -> None:
    page.metrics.serving({"max_num_seqs": 8, "compilation_config.mode": 3, "served_model_name": ['a "b"\n']})

    assert page.value("sloguard_serving_configuration_info", compilation_config_mode="3", promotion="none") == 1


def test_labels_have_an_end(page: Page) -> None:
    """The number of series does not depend on events."""
    lengths: set[int] = set()
    for number in range(30):
        page.metrics.traffic(engine := f"engine {number}", ("serving", "trial")[number % 2])
        change = pb.Change(name=f"argument {number}", rules=[f"rule {number}"])
        heard(
            page.metrics,
            finished(0.1, f"reason {number}"),
            pb.Event(repair_report=pb.RepairReport(changes=[change])),
            engine_id=engine,
        )
        page.metrics.trial(each := trial(number, planned(), Result(crash=oom(f"evidence {number}"))), [each])
        page.metrics.serving({"max_num_seqs": number}, promotion=number)
        lengths.add(len(page.get("/metrics")[1].splitlines()))

    assert len(lengths) == 1


def test_the_page_of_the_metrics_is_fresh() -> None:
    written = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")

    assert docs_page.metrics_page() == written, "python -m sidecar.metrics.docs_page > docs/metrics.md"


# A sidecar that is stopped: the kernel queues its connections.
PAUSED = """
import os, signal, sys
from pathlib import Path
from sidecar.config.schema import load_config
from sidecar.metrics.exporter import Metrics

server = Metrics(load_config(Path(sys.argv[1]))).serve(print)
print("serving", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
signal.pause()
"""


def test_a_busy_sidecar_keeps_no_load_balancer_from_connecting(tmp_path: Path) -> None:
    config_file = write_config(tmp_path)
    port = load_config(config_file).metrics.port
    with subprocess.Popen(
        [sys.executable, "-c", PAUSED, str(config_file)], stdout=subprocess.PIPE, text=True
    ) as paused:
        try:
            assert paused.stdout is not None
            assert paused.stdout.readline() == "serving\n"
            while psutil.Process(paused.pid).status() != psutil.STATUS_STOPPED:
                time.sleep(0.01)
            with ExitStack() as connected:
                for _ in range(50):
                    connected.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
                paused.send_signal(signal.SIGCONT)
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
                    assert answer.status == 200
        finally:
            paused.kill()


# A metrics server with 1,024 descriptors; each line on stdin starts a process, as for an engine.
SLOW_CLIENTS = """
import resource, subprocess, sys, threading, time
from pathlib import Path
from sidecar.config.schema import load_config
from sidecar.metrics.exporter import Metrics

resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
server = Metrics(load_config(Path(sys.argv[1]))).serve(print)
print("serving", flush=True)
for line in sys.stdin:
    engine = subprocess.run(["true"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    print(engine.returncode, descriptors, threading.active_count(), flush=True)
"""


def test_slow_clients_keep_neither_ready_nor_engines_from_working(tmp_path: Path) -> None:
    config_file = write_config(tmp_path)
    port = load_config(config_file).metrics.port
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    command = [sys.executable, "-c", SLOW_CLIENTS, str(config_file)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sidecar,
        ExitStack() as opened,
    ):
        opened.callback(sidecar.kill)
        assert sidecar.stdin is not None
        assert sidecar.stdout is not None
        assert sidecar.stdout.readline() == "serving\n"
        clients = [slow_client(port, opened) for _ in range(1100)]
        for _ in range(4):
            assert answers_within(5.0, f"http://127.0.0.1:{port}/ready") == 503
            sidecar.stdin.write("start an engine\n")
            sidecar.stdin.flush()
            code, descriptors, threads = map(int, sidecar.stdout.readline().split())
            assert (code, threads) == (0, 2)
            assert descriptors < http_server.MAX_AT_ONCE + http_server.BACKLOG + 50
            for client in clients:
                with suppress(OSError):
                    client.send(b"x")
            time.sleep(0.5)


def answers_within(seconds: float, url: str) -> int:
    """The status; during the flood a client may have to retry, as a load balancer does."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=seconds) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            assert time.monotonic() < deadline


def slow_client(port: int, opened: ExitStack) -> socket.socket:
    client = opened.enter_context(socket.socket())
    client.setblocking(False)
    client.connect_ex(("127.0.0.1", port))
    return client


@pytest.fixture
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "REQUEST_DEADLINE_S", 1.0)


@pytest.mark.usefixtures("short_deadline")
def test_a_request_that_is_never_complete_is_ended(page: Page) -> None:
    port = int(page.url.rpartition(":")[2])
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        with suppress(ConnectionError):
            while time.monotonic() - began < 60:
                client.send(b"G")
                time.sleep(0.1)
        assert time.monotonic() - began < 15


def test_goodput_in_the_file_is_the_error_budget_of_any(tmp_path: Path) -> None:
    metrics = Metrics(configured(tmp_path, "slo.goodput", 0.98))

    assert metrics.registry.get_sample_value("sloguard_slo_error_budget_ratio", {"objective": "any"}) == 0.02
    assert metrics.registry.get_sample_value("sloguard_slo_error_budget_ratio", {"objective": "ttft"}) == 0.01
