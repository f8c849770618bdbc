"""Hostile input: memory and threads stay bounded, and the service continues."""

import http.client
import math
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest
from fake_service import fake_config

from sidecar.config.schema import Config, load_config
from sidecar.metrics.exporter import Metrics
from sidecar.observe.telemetry import TelemetryHub
from vllm_sloguard.agent.engine_http import EngineHttp, Unanswered
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.hooks.telemetry_client import unix_target
from vllm_sloguard.wire import telemetry_pb2 as pb
from vllm_sloguard.wire.telemetry_pb2_grpc import TelemetryServiceStub, add_TelemetryServiceServicer_to_server


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Configuration of a sidecar on the fake engine."""
    return load_config(fake_config(tmp_path))


def batch(sequence: int, pid: int, *requests: pb.RequestFinished) -> pb.PublishRequest:
    events = [pb.Event(request_finished=request) for request in requests]
    return pb.PublishRequest(engine_id="one", process=pb.Process(pid=pid), sequence=sequence, events=events)


def code_of(error: grpc.RpcError) -> grpc.StatusCode:
    assert isinstance(error, grpc.Call)
    return error.code()


def test_a_message_that_is_too_large_is_refused_and_the_next_one_is_taken(tmp_path: Path) -> None:
    hub = TelemetryHub()
    hub.expect("one")
    server = serve_unix_socket(tmp_path / "s", lambda server: add_TelemetryServiceServicer_to_server(hub, server))
    try:
        with grpc.insecure_channel(unix_target(str(tmp_path / "s"))) as channel:
            stub = TelemetryServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                stub.Publish(batch(1, 1, pb.RequestFinished(finish_reason="x" * 5 * 2**20)), timeout=60)
            assert code_of(refused.value) is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert not hub.of("one").requests
            stub.Publish(batch(1, 1, pb.RequestFinished(finish_reason="stop")), timeout=60)
            assert len(hub.of("one").requests) == 1
    finally:
        server.stop(0)


def test_processes_without_end_are_refused_and_the_known_ones_are_heard(tmp_path: Path) -> None:
    hub = TelemetryHub()
    hub.expect("one")
    server = serve_unix_socket(tmp_path / "s", lambda server: add_TelemetryServiceServicer_to_server(hub, server))
    try:
        with grpc.insecure_channel(unix_target(str(tmp_path / "s"))) as channel:
            stub = TelemetryServiceStub(channel)
            for pid in range(4096):
                stub.Publish(batch(1, pid), timeout=60)
            with pytest.raises(grpc.RpcError) as refused:
                stub.Publish(batch(1, 4096), timeout=60)
            assert code_of(refused.value) is grpc.StatusCode.RESOURCE_EXHAUSTED
            stub.Publish(batch(2, 7, pb.RequestFinished()), timeout=60)
            assert len(hub.of("one").requests) == 1
    finally:
        server.stop(0)


def test_words_and_times_that_an_engine_makes_up_leave_the_metrics_whole(config: Config) -> None:
    metrics, hub = Metrics(config), TelemetryHub()
    hub.expect("one")
    metrics.traffic("one", "serving")

    def series() -> int:
        return sum(len(family.samples) for family in metrics.registry.collect())

    metrics.on_events(batch(1, 1, pb.RequestFinished(finish_reason="odd", e2e_seconds=1.0)), hub.of("one"))
    before = series()
    made_up = [
        pb.RequestFinished(finish_reason=f"reason {n}", e2e_seconds=bad, ttft_seconds=bad, inter_token_seconds=bad)
        for n, bad in enumerate([math.nan, math.inf, -math.inf, -1.0] * 25)
    ]
    metrics.on_events(batch(2, 1, *made_up), hub.of("one"))
    assert series() == before
    total = metrics.registry.get_sample_value("sloguard_request_e2e_seconds_sum", {"traffic": "serving"})
    assert total == 1.0
    other = {"traffic": "serving", "finish_reason": "other"}
    assert metrics.registry.get_sample_value("sloguard_requests_total", other) == 101


class Endless(BaseHTTPRequestHandler):
    """Answers every request with an endless body."""

    def do_GET(self) -> None:
        """Sends until the client closes."""
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 2**16)
        except OSError:
            return

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


@pytest.fixture
def endless() -> Generator[int]:
    """The port of a server whose responses never end."""
    server = HTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield int(server.server_address[1])
    server.shutdown()


def test_an_answer_without_an_end_is_no_answer(endless: int) -> None:
    with pytest.raises(Unanswered, match="/v1/models: more than 4194304 bytes"):
        EngineHttp("127.0.0.1", endless).model()


def test_the_metrics_port_only_tells(config: Config) -> None:
    metrics = Metrics(config)
    server = metrics.serve(print)
    try:
        before = metrics.registry.get_sample_value("sloguard_state", {"sloguard_state": "serving"})
        for method in ("POST", "PUT", "DELETE"):
            for path in ("/", "/ready", "/metrics", "/retune", "/../journal.sqlite"):
                connection = http.client.HTTPConnection("127.0.0.1", config.metrics.port, timeout=60)
                connection.request(method, path, body=b"x" * 100)
                assert connection.getresponse().status in (200, 404, 503)
                connection.close()
        assert metrics.registry.get_sample_value("sloguard_state", {"sloguard_state": "serving"}) == before
    finally:
        server.stop()
