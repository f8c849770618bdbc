"""The page on a real journal, hub, progress and control socket, with no engine: what it shows is written by hand."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
from engine_bench import write_config
from own_ports import own_port

from sidecar.config.schema import Config, load_config
from sidecar.measure.measurement import Measurement
from sidecar.metrics.exporter import Metrics
from sidecar.observe.telemetry import TelemetryHub
from sidecar.page.app import page_application
from sidecar.page.server import Sources, served
from sidecar.record.events import EventKind, Operations
from sidecar.record.journal import Journal, Run
from sidecar.record.states import Cause, State
from sidecar.record.trial import Plan, Result, Role, Trial
from sidecar.service.control_rpc import Control
from sidecar.service.mailbox import Mailbox
from sidecar.service.state_machine import StateMachine
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.crash import Category, Crash
from vllm_sloguard.wire import telemetry_pb2 as pb
from vllm_sloguard.wire.control_pb2_grpc import add_ControlServiceServicer_to_server

# A page imports it in its thread, which a test that ends at once would have to wait for.
assert page_application
OOM = Crash(
    Category.OUT_OF_MEMORY,
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "EngineCore",
    "starting",
    1,
)


def page_config(folder: Path, **sections: Any) -> Path:
    """A configuration with a page on its own port; ``sections`` override it."""
    page = {"enabled": True, "port": own_port(), **sections.pop("page", {})}
    return write_config(folder, page=page, **sections)


@dataclass
class PageBench:
    """The parts behind the page, and its address."""

    config: Config
    journal: Journal
    hub: TelemetryHub
    requests: Mailbox
    progress: StateMachine
    operations: Operations
    url: str
    said: list[str]
    sequences: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def token(self) -> str:
        """The state as an operator reads it."""
        return (self.config.state / "page.token").read_text().strip()

    def enter(self, state: State, why: str) -> None:
        """A change of state."""
        self.progress.enter(state, Cause.STARTED, why)

    def serve(self, why: str) -> None:
        """Goes through the states of a start."""
        self.enter(State.STARTING, "the sidecar has started")
        self.enter(State.SERVING, why)

    def tune(self, left_s: float) -> Run:
        """Opens a window and begins a run in it."""
        self.operations.record(EventKind.WINDOW_OPENED, reason="a window was requested")
        self.progress.window_end = time.monotonic() + left_s
        self.requests.begin_window()
        self.enter(State.DRAINING, "a window was requested")
        run = self.run()
        self.enter(State.TUNING, f"the service is drained for run {run.id}")
        return run

    def run(self) -> Run:
        """A new tuning run."""
        return self.journal.begin_run(
            self.config.digest(), self.config.model_dump_json(), dict(self.config.engine.args)
        )

    def begin(self, run: Run, role: Role, phase: str, reason: str = "because", **args: Any) -> Trial:
        """A trial that has started."""
        knobs = args or {"max_num_seqs": 2}
        return self.journal.begin_trial(run.id, Plan(role, knobs, knobs, phase, reason))

    def tried(self, run: Run, role: Role, phase: str, ended: Result | None, **args: Any) -> Trial:
        """A finished trial; None for an aborted one."""
        return self.journal.end_trial(self.begin(run, role, phase, **args), ended)

    def tell(self, engine_id: str, *latencies_ms: tuple[float, float, float]) -> None:
        """Requests that the engine's plugin reports: TTFT, ITL and end to end, milliseconds."""
        events = [
            pb.Event(
                request_finished=pb.RequestFinished(
                    ttft_seconds=ttft / 1000,
                    inter_token_seconds=itl / 1000,
                    e2e_seconds=e2e / 1000,
                    prompt_tokens=512,
                    output_tokens=128,
                    finish_reason="stop",
                )
            )
            for ttft, itl, e2e in latencies_ms
        ]
        self.sequences[engine_id] = self.sequences.get(engine_id, 0) + 1
        process = pb.Process(role=pb.PROCESS_ROLE_API_SERVER, pid=1)
        # The context is for refusals alone.
        self.hub.Publish(
            pb.PublishRequest(engine_id=engine_id, process=process, sequence=self.sequences[engine_id], events=events),
            cast(grpc.ServicerContext, None),
        )


def measured(ttft_ms: float = 300, itl_ms: float = 20, e2e_ms: float = 700, mean_ms: float | None = 300) -> Measurement:
    """The measurement of a load."""
    return Measurement(
        requests=100,
        failed=0,
        duration_s=10.0,
        ttft_p99_ms=ttft_ms,
        itl_p99_ms=itl_ms,
        e2e_p99_ms=e2e_ms,
        ttft_mean_ms=100.0,
        e2e_mean_ms=mean_ms,
        goodput_rps=10.0,
    )


def result(measurement: Measurement, *, violation: float = 0.0, stopped: str = "") -> Result:
    """A trial's result, with the mean latency as its objective."""
    value = None if measurement.e2e_mean_ms is None else -measurement.e2e_mean_ms
    return Result(violation=violation, value=value, measurement=measurement, stopped=stopped, start_s=1.0)


@contextmanager
def page_bench(config_file: Path, url: str | None = None) -> Generator[PageBench]:
    """Serves the page, and prints its address unless ``url`` is given."""
    config = load_config(config_file)
    config.state.mkdir(mode=0o700, exist_ok=True)
    journal, requests, metrics = Journal(config.state), Mailbox(), Metrics(config)
    requests.epoch = journal.take_over(1)
    hub = TelemetryHub(metrics.on_events)
    said: list[str] = []
    progress = StateMachine(journal, metrics, requests, said.append)
    operations = Operations(journal, config.base_digest())
    control = Control(config, requests, hub)
    server = serve_unix_socket(config.socket, lambda s: add_ControlServiceServicer_to_server(control, s))
    try:
        with served(Sources(config, hub, requests, progress), said.append):
            if url is None:
                url = next(line for line in said if line.startswith("page: ")).removeprefix("page: ").rstrip("/")
            yield PageBench(config, journal, hub, requests, progress, operations, url, said)
    finally:
        server.stop(0)
        journal.close()


Answer = tuple[int, dict[str, str], bytes]


def fetch(url: str, body: bytes | None = None, **headers: str) -> Answer:
    """Status, headers and body of one request."""
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def page_json(url: str) -> dict[str, Any]:
    """The view and the beat."""
    status, _, body = fetch(f"{url}/api/view")
    assert status == 200
    return json.loads(body)


def events(stream: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Server-sent events as they arrive."""
    name = ""
    for line in stream:
        text = line.decode().rstrip("\n")
        if text.startswith("event: "):
            name = text.removeprefix("event: ")
        elif text.startswith("data: "):
            yield name, json.loads(text.removeprefix("data: "))
