"""The components that the service is wired from."""

from dataclasses import dataclass

from sidecar.guard.guard import Guard
from sidecar.observe.telemetry import TelemetryHub
from sidecar.record.events import Operations
from sidecar.record.journal import Journal
from sidecar.run.engine_manager import EngineManager
from sidecar.run.trial_runner import TrialRunner
from sidecar.service.mailbox import Mailbox
from sidecar.service.observer import ServiceObserver


@dataclass(frozen=True)
class ServiceParts:
    """A sidecar's components, valid while it holds the lock on its state folder."""

    journal: Journal
    operations: Operations
    engines: EngineManager
    runner: TrialRunner
    guard: Guard
    hub: TelemetryHub
    metrics: ServiceObserver
    requests: Mailbox
