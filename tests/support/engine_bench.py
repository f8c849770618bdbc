"""Real vLLM with the demo's configuration: its tiny model and CPU settings."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import yaml
from own_ports import own_port

from sidecar.config.schema import Config, load_config
from sidecar.engine.live_knobs import LiveHub
from sidecar.guard.memory_learning import Learning
from sidecar.metrics.exporter import Metrics
from sidecar.observe.telemetry import TelemetryHub
from sidecar.record.journal import Journal
from sidecar.run.engine_manager import EngineManager
from sidecar.run.trial_runner import TrialRunner
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.guard import machine
from vllm_sloguard.wire.live_pb2_grpc import add_LiveServiceServicer_to_server
from vllm_sloguard.wire.telemetry_pb2_grpc import add_TelemetryServiceServicer_to_server

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
INCUMBENT: dict[str, Any] = yaml.safe_load((DEMO / "sloguard.yaml").read_text())["engine"]["args"]


def write_config(folder: Path, **changes: Any) -> Path:
    """Writes the demo's configuration with other values, on ports of its own, and returns its path."""
    content = yaml.safe_load((DEMO / "sloguard.yaml").read_text())
    content |= {"model": str(DEMO / "model"), "state": str(folder / "state")}
    content["engine"]["port"] = own_port()
    content["metrics"] = {"port": own_port()}
    content["page"] = {"enabled": False}
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / "sloguard.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@dataclass(frozen=True)
class Bench:
    """A sidecar's parts without its loop."""

    config: Config
    journal: Journal
    hub: TelemetryHub
    server: grpc.Server
    engines: EngineManager
    runner: TrialRunner
    learning: Learning


@contextmanager
def bench(config_file: Path) -> Generator[Bench]:
    """Everything that a trial needs; cleans up at the end."""
    config = load_config(config_file)
    journal = Journal(config.state)
    metrics = Metrics(config)
    hub = TelemetryHub(metrics.on_events)
    live = LiveHub()

    def register(server: grpc.Server) -> None:
        add_TelemetryServiceServicer_to_server(hub, server)
        add_LiveServiceServicer_to_server(live, server)

    server = serve_unix_socket(config.socket, register)
    learning = Learning(journal, config.state, config.model, lambda ranks: machine.observe(ranks=ranks))
    engines = EngineManager(config, learning, hub, live, metrics.traffic, print)
    runner = TrialRunner(config, engines, hub, live, print)
    try:
        yield Bench(config, journal, hub, server, engines, runner, learning)
    finally:
        engines.orphans.end()
        runner.close()
        engines.end_forks()
        live.close()
        server.stop(0)
        journal.close()
