"""Malformed messages on the private socket: each gets a gRPC error, and the service is unchanged."""

import contextlib
import logging
import sqlite3
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_service import fake_config, said_by, serving, state_of
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from hypothesis import assume, given
from hypothesis import strategies as st
from malformed import COUNTS, assert_clear, broken_bytes, fuzzed

from sidecar.config.schema import Config, load_config
from sidecar.engine.live_knobs import LiveError, LiveHub, live_targets
from sidecar.metrics.exporter import Metrics
from sidecar.observe.telemetry import TelemetryHub
from sidecar.record.journal import JOURNAL_FILE
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.hooks.telemetry_client import unix_target
from vllm_sloguard.wire import control_pb2, live_pb2
from vllm_sloguard.wire import telemetry_pb2 as pb
from vllm_sloguard.wire.live_pb2_grpc import add_LiveServiceServicer_to_server
from vllm_sloguard.wire.telemetry_pb2_grpc import add_TelemetryServiceServicer_to_server

EPOCH = 7
# A handler that raised would be UNKNOWN.
CLEAR = {
    grpc.StatusCode.INTERNAL,  # gRPC's own for what it can't decode
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def called(channel: Any, method: str) -> Any:
    """A call that sends and returns raw bytes."""
    return channel.unary_unary(f"/sloguard.v1.{method}")


class Logged(logging.Handler):
    """The log of gRPC's server."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the formatted record."""
        self.lines.append(self.format(record))


@dataclass(frozen=True)
class Hearing:
    """The hubs, the metrics, and the calls that reach them."""

    hub: TelemetryHub
    live: LiveHub
    metrics: Metrics
    publish: Any
    ask: Any
    logged: Logged


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Generator[Hearing]:
    """Shared by the module."""
    folder = tmp_path_factory.mktemp("hub")
    metrics = Metrics(load_config(fake_config(folder)))
    hub, logged = TelemetryHub(metrics.on_events), Logged()
    hub.expect("one")
    metrics.traffic("one", "serving")
    live = LiveHub(epoch=EPOCH)
    live.expect("one")

    def register(server: grpc.Server) -> None:
        add_TelemetryServiceServicer_to_server(hub, server)
        add_LiveServiceServicer_to_server(live, server)

    server = serve_unix_socket(folder / "s", register)
    loggers = [logging.getLogger(name) for name in ("grpc._server", "grpc._common")]
    for logger in loggers:
        logger.addHandler(logged)
    with grpc.insecure_channel(unix_target(str(folder / "s"))) as channel:
        call = called(channel, "TelemetryService/Publish")
        called(channel, "LiveService/Await")(live_pb2.AwaitRequest(engine_id="one").SerializeToString(), timeout=60)
        with pytest.raises(LiveError):
            live.change("one", {}, 0.0)  # nobody takes it: it is number 1, and its undoing number 2
        yield Hearing(hub, live, metrics, call, called(channel, "LiveService/Await"), logged)
    for logger in loggers:
        logger.removeHandler(logged)
    server.stop(0)


NUMBERS = st.floats() | st.sampled_from([0.0, -1.0, 1e308, float("nan"), float("inf")])
TEXTS = st.text(max_size=20) | st.sampled_from(["one", "stop", "None", "{}", "x" * 5000, "\0"])
WHOLE = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_ENUM: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
}


@st.composite
def filled(draw: st.DrawFn, kind: Any) -> Any:
    """A message of ``kind`` with arbitrary values in arbitrary fields."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            values = filled(message_factory.GetMessageClass(field.message_type))
        elif field.type in WHOLE:
            values = st.integers(*WHOLE[field.type]) | st.integers(0, 9)
        else:
            values = TEXTS if field.type == FieldDescriptor.TYPE_STRING else NUMBERS
        holder = getattr(message, field.name)
        if hasattr(holder, "extend"):
            holder.extend(draw(st.lists(values, max_size=3)))
        elif hasattr(holder, "CopyFrom"):
            holder.CopyFrom(draw(values))
        elif field.type != FieldDescriptor.TYPE_BOOL:
            setattr(message, field.name, draw(values))
    return message


def of_a_known_engine(batch: pb.PublishRequest) -> bytes:
    batch.engine_id = "one"
    return batch.SerializeToString()


BATCHES = filled(pb.PublishRequest).map(of_a_known_engine)
MESSAGES = st.one_of(
    BATCHES,
    BATCHES.flatmap(broken_bytes),
    filled(pb.PublishRequest).map(pb.PublishRequest.SerializeToString),
    st.binary(max_size=60),
)


def answered(kind: str, call: Any, message: bytes) -> None:
    """Makes the call and checks the reply."""
    error = refused(call, message)
    if error is None:
        COUNTS[kind, "taken"] += 1
        return
    assert error.code() in CLEAR, f"{error.code()}: {error.details()}"
    assert_clear(error.details() or "")
    COUNTS[kind, "refused"] += 1


def refused(call: Any, message: bytes) -> Any:
    """The error of a call, or None."""
    try:
        call(message, timeout=60)
    except grpc.RpcError as error:
        return error
    return None


@fuzzed
@given(MESSAGES)
def test_telemetry(hearing: Hearing, message: bytes) -> None:
    hearing.logged.lines.clear()
    answered("telemetry message", hearing.publish, message)
    for line in hearing.logged.lines:
        assert_clear(line)


def of_the_last_change(asked: live_pb2.AwaitRequest) -> bytes:
    asked.engine_id, asked.engine_index = "one", 0
    asked.report.epoch, asked.report.change_id = EPOCH, 2
    # Others wait for as long as they say, within bounds.
    asked.wait_seconds = 0.0 if asked.wait_seconds > 0 else asked.wait_seconds
    return asked.SerializeToString()


AWAITS = filled(live_pb2.AwaitRequest).map(of_the_last_change)


@fuzzed
@given(st.one_of(AWAITS, AWAITS.flatmap(broken_bytes), st.binary(max_size=60)))
def test_live_changes(hearing: Hearing, message: bytes) -> None:
    hearing.logged.lines.clear()
    answered("live message", hearing.ask, message)
    for line in hearing.logged.lines:
        assert_clear(line)
    # What a core makes up does not trouble those who ask what came of a change.
    with contextlib.suppress(LiveError):
        able = hearing.live.capabilities("one", 0.0)
        assert live_targets({"max_num_seqs": 8}, {"max_num_seqs": 9}, able) in (None, {"max_num_seqs": 9})
        hearing.live.effects("one")


def test_telemetry_is_still_taken_and_shown(hearing: Hearing) -> None:
    from prometheus_client.exposition import generate_latest

    pid = 12345
    for sequence in (1, 2, 2):
        request = pb.RequestFinished(e2e_seconds=1.0, finish_reason="stop")
        batch = pb.PublishRequest(
            engine_id="one", process=pb.Process(pid=pid), sequence=sequence, events=[pb.Event(request_finished=request)]
        )
        hearing.publish(batch.SerializeToString(), timeout=60)
    assert hearing.hub.of("one").sequences[pid] == 2
    page = generate_latest(hearing.metrics.registry).decode()
    sums = [line for line in page.splitlines() if line.startswith("sloguard_request_") and "_sum" in line]
    assert sums
    assert all(float(line.rpartition(" ")[2]) >= 0 for line in sums)


@dataclass(frozen=True)
class Controlled:
    """A serving sidecar and the calls of its control service by name."""

    config_file: Path
    config: Config
    channel: grpc.Channel


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Generator[Controlled]:
    """Shared by the module."""
    config_file = fake_config(tmp_path_factory.mktemp("controlled"))
    config = load_config(config_file)
    with serving(config_file), grpc.insecure_channel(unix_target(str(config.socket))) as channel:
        yield Controlled(config_file, config, channel)


METHODS = {m.name: m.input_type for m in control_pb2.DESCRIPTOR.services_by_name["ControlService"].methods}


def retune(seconds: float) -> bytes:
    return control_pb2.RetuneRequest(duration_seconds=seconds).SerializeToString()


OUTSIDE = st.floats(max_value=-1e-300) | st.floats(min_value=604801) | st.just(float("nan"))
RETUNES = OUTSIDE.map(retune)


def malformed(method: str, message: bytes) -> bool:
    """Whether the request can't be parsed, or names an impossible window."""
    kind = message_factory.GetMessageClass(METHODS[method])
    try:
        read: Any = kind.FromString(message)
    except DecodeError:
        return True
    return method == "Retune" and not 0 <= read.duration_seconds <= 604800


def recorded(config: Config) -> dict[str, int]:
    """Rows by table."""
    with sqlite3.connect(f"file:{config.state / JOURNAL_FILE}?mode=ro", uri=True) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}  # noqa: S608


@fuzzed
@given(st.sampled_from(sorted(METHODS)), st.one_of(RETUNES, RETUNES.flatmap(broken_bytes), st.binary(min_size=1)))
def test_control(controlled: Controlled, method: str, message: bytes) -> None:
    assume(malformed(method, message))
    call = called(controlled.channel, f"ControlService/{method}")
    answered("control request", call, message)


def test_control_changed_nothing(controlled: Controlled) -> None:
    before = recorded(controlled.config)
    call = called(controlled.channel, "ControlService/Retune")
    for message in (b"\xff\xff", retune(-1)):
        with pytest.raises(grpc.RpcError):
            call(message, timeout=60)
    assert recorded(controlled.config) == before
    assert before["states"] == 2, "it has started and serves, and nothing else was ever asked for"
    assert state_of(controlled.config.state) == "serving"
    said = said_by(controlled.config_file).read_text()
    assert "Traceback" not in said
    assert all(len(line) < 1000 for line in said.splitlines())
