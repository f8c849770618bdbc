"""Wires a sidecar's components together from its configuration."""

from collections.abc import Generator
from contextlib import contextmanager, suppress

import grpc

from sidecar.config.schema import Config
from sidecar.engine.agent_client import AgentTaken
from sidecar.engine.live_knobs import LiveHub
from sidecar.engine.log_bounds import bounded_logs
from sidecar.format import Say
from sidecar.guard.guard import Guard
from sidecar.guard.memory_learning import Learning
from sidecar.observe.telemetry import TelemetryHub
from sidecar.record import lock
from sidecar.record.events import Operations
from sidecar.record.journal import Journal
from sidecar.run.agent_engines import AgentEngineManager, agent_client
from sidecar.run.engine_manager import LOGS, EngineManager
from sidecar.run.trial_runner import TrialRunner
from sidecar.service import remote_rpc
from sidecar.service.control_rpc import Control
from sidecar.service.mailbox import Mailbox
from sidecar.service.observer import ServiceObserver
from sidecar.service.parts import ServiceParts
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.agent.private_files import private_files
from vllm_sloguard.guard import machine
from vllm_sloguard.wire.control_pb2_grpc import add_ControlServiceServicer_to_server
from vllm_sloguard.wire.live_pb2_grpc import add_LiveServiceServicer_to_server
from vllm_sloguard.wire.telemetry_pb2_grpc import add_TelemetryServiceServicer_to_server


@contextmanager
def assembled(config: Config, say: Say, metrics: ServiceObserver) -> Generator[ServiceParts]:
    """The components, with their servers started; on exit no trial process is left running.

    Raises LockedError, JournalError, ConfigError, OSError.
    """
    with (
        lock.held(config.state),
        private_files(config.state),
        bounded_logs(config.state / LOGS),
        agent_client(config, say) as client,
    ):
        requests = Mailbox()
        live, hub = LiveHub(), TelemetryHub(metrics.on_events)
        control = Control(config, requests, hub)

        def register(server: grpc.Server) -> None:
            add_TelemetryServiceServicer_to_server(hub, server)
            add_LiveServiceServicer_to_server(live, server)
            add_ControlServiceServicer_to_server(control, server)

        seen: dict[int, machine.Machine] = {}

        def observe(ranks: int) -> machine.Machine:
            # Memory held by a trial's engine will be free for the next one, so don't observe it now.
            if ranks not in seen or not runner.occupied:
                seen[ranks] = engines.machine(ranks)
            return seen[ranks]

        journal = Journal(config.state)
        servers = [serve_unix_socket(config.socket, register)]
        if config.remote is not None:
            servers.append(
                remote_rpc.serve_remote(config.remote, lambda s: add_ControlServiceServicer_to_server(control, s))
            )
        learning = Learning(journal, config.state, config.model, observe)
        if client is None:
            engines = EngineManager(config, learning, hub, live, metrics.traffic, say)
        else:
            engines = AgentEngineManager(config, learning, hub, live, metrics.traffic, say, client)
        runner = TrialRunner(config, engines, hub, live, say)
        try:
            guard = Guard(config, observe, learning.current, engines.known_model)
            operations = Operations(journal, config.base_digest())
            yield ServiceParts(journal, operations, engines, runner, guard, hub, metrics, requests)
        finally:
            with suppress(AgentTaken):  # it has ended what was left there
                runner.close()
            engines.close()
            live.close()
            for stopped in [server.stop(grace=0.5) for server in servers]:
                stopped.wait(2)
            journal.close()
