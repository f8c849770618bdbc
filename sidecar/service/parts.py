"""What the service is made of."""

from dataclasses import dataclass

from sidecar.guard.guard import Guard
from sidecar.metrics.exporter import Metrics
from sidecar.observe.telemetry import TelemetryHub
from sidecar.record.events import Operations
from sidecar.record.journal import Journal
from sidecar.run.engine_manager import Engines
from sidecar.run.trial_runner import Runner
from sidecar.service.mailbox import Requests


@dataclass(frozen=True)
class Parts:
    """What a sidecar works with, for as long as it holds its state folder."""

    journal: Journal
    operations: Operations
    engines: Engines
    runner: Runner
    guard: Guard
    hub: TelemetryHub
    metrics: Metrics
    requests: Requests
