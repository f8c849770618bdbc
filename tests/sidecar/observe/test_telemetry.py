"""The plugin's link and the sidecar's hub over real gRPC: each event arrives once, and vLLM is never blocked."""

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import grpc
import pytest
from sidecar_cases import until

from sidecar.observe.telemetry import TelemetryHub
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.hooks.settings import Settings
from vllm_sloguard.hooks.telemetry_client import TelemetryClient
from vllm_sloguard.wire import telemetry_pb2 as pb
from vllm_sloguard.wire.telemetry_pb2_grpc import TelemetryServiceStub, add_TelemetryServiceServicer_to_server


@contextlib.contextmanager
def serving(hub: TelemetryHub, socket: Path) -> Generator[None]:
    server = serve_unix_socket(socket, lambda server: add_TelemetryServiceServicer_to_server(hub, server))
    try:
        yield
    finally:
        server.stop(grace=None).wait(5)


def expecting(*engine_ids: str) -> TelemetryHub:
    hub = TelemetryHub()
    for engine_id in engine_ids:
        hub.expect(engine_id)
    return hub


def request(number: int) -> pb.Event:
    return pb.Event(request_finished=pb.RequestFinished(prompt_tokens=number))


def link_to(socket: Path, queue_events: int = 10_000) -> TelemetryClient:
    return TelemetryClient(Settings(socket=str(socket), engine_id="one", queue_events=queue_events))


def numbers(hub: TelemetryHub) -> list[int]:
    return [r.prompt_tokens for r in hub.of("one").requests]


def batch(sequence: int, pid: int = 1, engine_id: str = "one", *events: pb.Event) -> pb.PublishRequest:
    process = pb.Process(role=pb.PROCESS_ROLE_WORKER, pid=pid)
    return pb.PublishRequest(engine_id=engine_id, process=process, sequence=sequence, events=events)


def test_every_event_arrives_once_and_in_order(tmp_path: Path) -> None:
    hub, link = expecting("one"), link_to(tmp_path / "s")
    with serving(hub, tmp_path / "s"):
        link.open()
        link.open()
        for number in range(1, 1201):  # more than two batches
            link.emit(request(number))
        until(lambda: len(numbers(hub)) >= 1200)
        link.emit(request(1201))
        link.flush(60.0)

        assert numbers(hub) == list(range(1, 1202))
    assert list(hub.of("one").dropped.values()) == [0]


def test_threads_may_emit_at_once(tmp_path: Path) -> None:
    hub, link = expecting("one"), link_to(tmp_path / "s")
    with serving(hub, tmp_path / "s"):
        link.open()
        emitters = [threading.Thread(target=emit_seconds, args=(link, range(b, b + 200))) for b in (0, 1000, 2000)]
        for emitter in emitters:
            emitter.start()
        for emitter in emitters:
            emitter.join()
        link.flush(60.0)

        until(lambda: len(numbers(hub)) >= 600)
        assert sorted(numbers(hub)) == [base + i for base in (0, 1000, 2000) for i in range(200)]


def test_a_batch_that_comes_again_is_counted_once_in_each_process(tmp_path: Path) -> None:
    heard: list[int] = []
    hub = TelemetryHub(lambda batch, _engine: heard.extend(e.request_finished.prompt_tokens for e in batch.events))
    hub.expect("one")
    with serving(hub, tmp_path / "s"), grpc.insecure_channel(f"unix:{tmp_path / 's'}") as channel:
        stub = TelemetryServiceStub(channel)
        for again in (batch(1, 7, "one", request(1)), batch(2, 7, "one", request(2)), batch(1, 8, "one", request(3))):
            stub.Publish(again, timeout=60)
            stub.Publish(again, timeout=60)

    assert numbers(hub) == heard == [1, 2, 3]


def test_a_batch_whose_answer_was_late_is_counted_once(tmp_path: Path) -> None:
    class Slow(TelemetryHub):
        late = True

        def Publish(  # noqa: N802
            self, request: pb.PublishRequest, context: grpc.ServicerContext
        ) -> pb.PublishResponse:
            answer = super().Publish(request, context)
            if self.late:
                self.late = False
                time.sleep(0.6)
            return answer

    hub, link = Slow(), link_to(tmp_path / "s")
    hub.expect("one")
    with serving(hub, tmp_path / "s"):
        link.emit(request(1))
        link.flush(0.3)
        time.sleep(0.1)
        link.emit(request(2))
        link.flush(60.0)

        assert numbers(hub) == [1, 2]


def test_an_engine_that_is_not_expected_is_refused(tmp_path: Path) -> None:
    hub = expecting("one")
    with serving(hub, tmp_path / "s"), grpc.insecure_channel(f"unix:{tmp_path / 's'}") as channel:
        with pytest.raises(grpc.RpcError, match="'other' is not running here") as raised:
            TelemetryServiceStub(channel).Publish(batch(1, 7, "other", request(1)), timeout=60)
        assert isinstance(raised.value, grpc.Call)
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        # The hub still accepts the others.
        TelemetryServiceStub(channel).Publish(batch(1, 7, "one", request(2)), timeout=60)

    assert numbers(hub) == [2]
    assert len(hub.of("other").requests) == 0


def test_only_the_last_engines_are_kept() -> None:
    hub = expecting(*(f"engine-{i}" for i in range(100)))

    context = object()
    for engine_id in ("engine-99", "engine-95"):
        hub.Publish(batch(1, 1, engine_id, request(1)), context)  # pyright: ignore[reportArgumentType]
        assert len(hub.of(engine_id).requests) == 1
    with pytest.raises(AttributeError):  # it would abort the call
        hub.Publish(batch(1, 1, "engine-0", request(1)), context)  # pyright: ignore[reportArgumentType]


def test_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    with serving(expecting(), tmp_path / "s"):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


def test_socket_of_a_dead_sidecar_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    hub, link = expecting("one"), link_to(tmp_path / "s")
    with serving(hub, tmp_path / "s"):
        link.emit(request(1))
        link.flush(60.0)

    assert numbers(hub) == [1]


@pytest.mark.parametrize("name", ["a b", "a#b", "a?b", "a%20b", "ä"])
def test_the_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    socket = tmp_path / name / "s"
    hub, link = expecting("one"), link_to(socket)
    with serving(hub, socket):
        assert socket.is_socket()
        link.emit(request(1))
        link.flush(60.0)

    assert numbers(hub) == [1]


def test_a_full_queue_drops_the_oldest_and_counts_them(tmp_path: Path) -> None:
    hub, link = expecting("one"), link_to(tmp_path / "s", queue_events=5)
    for number in range(1, 13):
        link.emit(request(number))
    assert link.dropped == 7
    with serving(hub, tmp_path / "s"):
        link.flush(60.0)

    assert numbers(hub) == [8, 9, 10, 11, 12]
    assert hub.of("one").dropped == {os.getpid(): 7}


def test_without_a_socket_nothing_is_kept() -> None:
    link = TelemetryClient(Settings(queue_events=1))
    link.open()
    for number in range(3):
        link.emit(request(number))
    began = time.monotonic()
    link.flush(60.0)

    assert time.monotonic() - began < 30
    assert link.dropped == 0


def test_events_are_stamped_where_they_have_no_time(tmp_path: Path) -> None:
    hub, link = expecting("one"), link_to(tmp_path / "s")
    before = time.time()
    link.emit(pb.Event(phase_reached=pb.PhaseReached(phase=pb.PHASE_MODEL_LOADED)))
    kept = pb.PhaseReached(phase=pb.PHASE_KV_CACHE_READY, kv_cache_tokens=64)
    link.emit(pb.Event(time_unix_seconds=5.0, phase_reached=kept))
    with serving(hub, tmp_path / "s"):
        link.flush(60.0)

    phases = hub.of("one").phases
    assert before <= phases[pb.PHASE_MODEL_LOADED] <= time.time()
    assert phases[pb.PHASE_KV_CACHE_READY] == 5.0
    assert hub.of("one").kv_cache_tokens == 64


def test_steps_crashes_and_repairs_are_sorted(tmp_path: Path) -> None:
    hub, link = expecting("one"), link_to(tmp_path / "s")
    for running in (4, 2):
        link.emit(pb.Event(step_stats=pb.StepStats(running_requests=running, steps=10, preemptions=1)))
    link.emit(pb.Event(crash_report=pb.CrashReport(exception_type="E", message="m")))
    link.emit(pb.Event(repair_report=pb.RepairReport(refusal="no")))
    link.emit(pb.Event())
    with serving(hub, tmp_path / "s"):
        link.flush(60.0)

    said = hub.of("one")
    assert (said.levels.running_requests, said.total_steps, said.preemptions) == (2, 20, 2)
    assert [c.exception_type for c in said.crashes] == ["E"]
    assert said.repair is not None
    assert said.repair.refusal == "no"


def emit_seconds(link: TelemetryClient, numbers: range) -> list[float]:
    took: list[float] = []
    for number in numbers:
        event = request(number)
        began = time.perf_counter()
        link.emit(event)
        took.append(time.perf_counter() - began)
    return took


def test_emit_does_not_block_without_a_sidecar_and_a_later_one_gets_all_events(tmp_path: Path) -> None:
    hub, link = expecting("one"), link_to(tmp_path / "s")
    link.open()
    took = emit_seconds(link, range(300))
    began = time.monotonic()
    link.flush(0.3)

    assert time.monotonic() - began < 30
    assert statistics.median(took) < 0.001

    with serving(hub, tmp_path / "s"):
        until(lambda: len(numbers(hub)) >= 300)
        assert numbers(hub) == list(range(300))


# Prints the number of each request it receives.
SERVER = """
import sys, time
from pathlib import Path
from sidecar.observe.telemetry import TelemetryHub
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.wire.telemetry_pb2_grpc import add_TelemetryServiceServicer_to_server
def heard(batch, engine):
    for event in batch.events:
        print(event.request_finished.prompt_tokens, flush=True)
hub = TelemetryHub(heard)
hub.expect("one")
server = serve_unix_socket(Path(sys.argv[1]), lambda server: add_TelemetryServiceServicer_to_server(hub, server))
print("up", flush=True)
time.sleep(600)
"""


def test_emit_does_not_block_on_a_hung_sidecar_which_gets_all_events_once_it_resumes(tmp_path: Path) -> None:
    log, link = tmp_path / "log", link_to(tmp_path / "s")
    with log.open("w") as output:
        server = subprocess.Popen([sys.executable, "-c", SERVER, tmp_path / "s"], stdout=output)
    try:
        until(lambda: log.read_text().startswith("up"))
        link.open()
        link.emit(request(0))
        until(lambda: log.read_text().split() == ["up", "0"])

        os.kill(server.pid, signal.SIGSTOP)
        took = emit_seconds(link, range(1, 301))
        began = time.monotonic()
        link.flush(0.5)
        assert time.monotonic() - began < 30
        took += emit_seconds(link, range(301, 601))
        assert statistics.median(took) < 0.001

        os.kill(server.pid, signal.SIGCONT)
        until(lambda: len(log.read_text().split()) >= 602)
        assert log.read_text().split() == ["up", *(str(number) for number in range(601))]
    finally:
        server.kill()
        server.wait()


FORKER = """
import os, sys
from vllm_sloguard.hooks.telemetry_client import TelemetryClient
from vllm_sloguard.hooks.settings import Settings
from vllm_sloguard.wire import telemetry_pb2 as pb
link = TelemetryClient(Settings(socket=sys.argv[1], engine_id="one"))
def emit(number):
    link.emit(pb.Event(request_finished=pb.RequestFinished(prompt_tokens=number)))
emit(1), emit(2)
child = os.fork()
emit(100 if child == 0 else 3)
link.open()
link.flush(60)
if child:
    os.waitpid(child, 0)
os._exit(0)
"""


def test_a_forked_process_starts_with_nothing_of_its_parent(tmp_path: Path) -> None:
    hub = expecting("one")
    with serving(hub, tmp_path / "s"):
        subprocess.run([sys.executable, "-c", FORKER, tmp_path / "s"], check=True, timeout=180)

    assert sorted(numbers(hub)) == [1, 2, 3, 100]
    assert len(hub.of("one").sequences) == 2


def test_sources_are_digested_often_and_sent_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call costs as much as hundreds of steps, and vLLM's records must not pile up meanwhile."""
    monkeypatch.setattr("vllm_sloguard.hooks.telemetry_client._DIGEST_S", 0.02)
    monkeypatch.setattr("vllm_sloguard.hooks.telemetry_client._SEND_S", 1.0)
    calls: list[int] = []
    hub = TelemetryHub(lambda batch, _engine: calls.append(len(batch.events)))
    hub.expect("one")
    link, digests = link_to(tmp_path / "s"), itertools.count(1)
    with serving(hub, tmp_path / "s"):
        link.add_source(lambda: [request(next(digests))], lambda: [pb.Event(step_stats=pb.StepStats(steps=1))])
        link.open()
        until(lambda: len(calls) >= 3)
        link.flush(60.0)

        arrived = numbers(hub)
        assert arrived == list(range(1, len(arrived) + 1))
        assert hub.of("one").total_steps == len(calls)  # the totals come once a call
        assert len(arrived) > 3 * len(calls)


@pytest.mark.parametrize("length", [1, 127, 128, 5_000, 70_000])
def test_events_of_any_length_are_put_into_a_batch(tmp_path: Path, length: int) -> None:
    hub, link = expecting("one"), link_to(tmp_path / "s")
    with serving(hub, tmp_path / "s"):
        for number in range(3):
            report = pb.CrashReport(exception_type=str(number), message="x" * length)
            link.emit(pb.Event(crash_report=report))
        link.flush(60.0)

        crashes = hub.of("one").crashes
        assert [(c.exception_type, len(c.message)) for c in crashes] == [("0", length), ("1", length), ("2", length)]
