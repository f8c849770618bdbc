"""The file that tells `sloguard status` whether users' requests meet the SLO."""

import time
from pathlib import Path

import grpc
import pytest
from sidecar_cases import configured, until

from sidecar.config.schema import Config
from sidecar.observe.served_slo import SERVED_SLO_FILE, ServedSlo, read_served_slo
from sidecar.observe.slo_compliance import SloCompliance
from sidecar.observe.telemetry import TelemetryHub
from sidecar.service.mailbox import Mailbox
from sidecar.service.served_slo_file import ServedSloFile
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.wire import telemetry_pb2 as pb
from vllm_sloguard.wire.telemetry_pb2_grpc import TelemetryServiceStub, add_TelemetryServiceServicer_to_server

SLOW_S, FAST_S = 0.9, 0.1  # of a limit of 0.5 s


@pytest.fixture
def config(tmp_path: Path) -> Config:
    found = configured(tmp_path)
    found.state.mkdir()
    return found


def publish(hub: TelemetryHub, socket: Path, ttft_s: float, count: int) -> None:
    """Sends finished requests as the plugin of the engine "one" does."""
    finished = pb.RequestFinished(
        ttft_seconds=ttft_s, e2e_seconds=1.0, prompt_tokens=64, output_tokens=8, finish_reason="length"
    )
    process = pb.Process(role=pb.PROCESS_ROLE_WORKER, pid=1)
    events = [pb.Event(request_finished=finished)] * count
    server = serve_unix_socket(socket, lambda s: add_TelemetryServiceServicer_to_server(hub, s))
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        batch = pb.PublishRequest(engine_id="one", process=process, sequence=1, events=events)
        TelemetryServiceStub(channel).Publish(batch, timeout=60)
    server.stop(grace=None).wait(5)
    until(lambda: len(hub.of("one").requests) >= count)


def written(config: Config) -> ServedSlo | None:
    return read_served_slo(config.state, time.time(), 120.0)


@pytest.mark.parametrize(
    ("ttft_s", "count", "expected"),
    [
        (FAST_S, 300, SloCompliance.MET),
        (SLOW_S, 300, SloCompliance.MISSED),
        (SLOW_S, 3, SloCompliance.UNKNOWN),
    ],
)
def test_users_requests_to_the_serving_engine_are_judged(
    config: Config, tmp_path: Path, ttft_s: float, count: int, expected: SloCompliance
) -> None:
    hub, requests = TelemetryHub(), Mailbox(engine_id="one")
    hub.expect("one")
    publish(hub, tmp_path / "s", ttft_s, count)

    ServedSloFile(config, hub, requests).update()

    found = written(config)
    assert found is not None
    assert (found.report.compliance, found.report.requests) == (expected, count)


def test_it_is_written_every_half_minute_only(config: Config) -> None:
    file = ServedSloFile(config, TelemetryHub(), Mailbox(engine_id="one"))
    file.update()
    first = written(config)
    assert first is not None
    assert first.report.compliance is SloCompliance.UNKNOWN
    (config.state / SERVED_SLO_FILE).unlink()
    file.update()
    assert written(config) is None


def test_a_folder_that_can_not_be_written_does_not_end_the_service(config: Config) -> None:
    (config.state / SERVED_SLO_FILE).mkdir()
    ServedSloFile(config, TelemetryHub(), Mailbox(engine_id="one")).update()
    assert written(config) is None
