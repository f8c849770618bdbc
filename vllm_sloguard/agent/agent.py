"""What the agent does for a controller: the lease, engines, loads, and the restore when no controller is left."""

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from vllm_sloguard.agent.allowed_arguments import AllowList, check_bench_argv
from vllm_sloguard.agent.answered_requests import AnsweredRequests
from vllm_sloguard.agent.engine_http import EngineHttp, Unanswered
from vllm_sloguard.agent.engine_spec import EngineLife, EngineRole, EngineSpec, EngineStatus
from vllm_sloguard.agent.lease import ControllerId, Lease
from vllm_sloguard.agent.load_process import LoadProcess
from vllm_sloguard.agent.plugin_relay import PluginRelay, RelaySession
from vllm_sloguard.agent.slot import EngineSlot, PortTakenError, SlotBusyError
from vllm_sloguard.agent.state_file import AgentFolder
from vllm_sloguard.starts.load_protocol import EndLoad, RunLoad

_LONGEST_BACKOFF_S = 60.0
_PATHS = frozenset({"/health", "/metrics", "/v1/models", "/v1/completions"})
_LONGEST_HTTP_S = 120.0


@dataclass(frozen=True)
class AgentSetup:
    """What an agent was started with.

    ``command`` is the service's own command line, ``service`` the same as a configuration, and ``untunable`` the reason
    why it can't be tuned, if it can't. ``local``: it listens on a Unix socket, so its callers are on this machine.
    """

    python: str
    folder: AgentFolder
    allowed: AllowList
    local: bool
    command: tuple[str, ...] = ()
    service: EngineSpec | None = None
    untunable: str = ""
    keep_kernels: bool = True


class Agent:
    """One agent; its methods are called from many threads."""

    def __init__(self, setup: AgentSetup, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        self.id = uuid.uuid4().hex
        self.setup = setup
        self._say = say
        self._lock = threading.Lock()
        self._lease = Lease()
        self._lease_s = 0.0
        self.slot = EngineSlot(setup.python, environment, setup.folder, say, keep_kernels=setup.keep_kernels)
        self.relay = PluginRelay()
        self._loads = LoadProcess(setup.python, setup.folder.other_log("load-client"), environment)
        self._answered = AnsweredRequests()
        self._restore_at = self._backoff_s = 0.0
        self._supervising = threading.Lock()
        self._take_over()

    def _take_over(self) -> None:
        """Adopts the engines of a killed agent, whose controller has one lease to come back."""
        saved = self.setup.folder.load()
        if saved.restored is not None and saved.restored.command not in ((), self.setup.command):
            saved = replace(saved, restored=None)  # of another command line
        self.slot.take_over(saved)
        if saved.epoch:
            holder = ControllerId(saved.journal_id, saved.epoch)
            self._lease = Lease(holder, time.monotonic() + saved.lease_s)
            self._lease_s = saved.lease_s

    # The lease

    @property
    def controller(self) -> tuple[ControllerId | None, float]:
        """The latest controller, and the seconds left of its lease."""
        with self._lock:
            return self._lease.holder, self._lease.left_s(time.monotonic())

    @property
    def controlled(self) -> bool:
        """Whether a controller holds the lease."""
        return self.controller[1] > 0

    def acquire(self, controller: ControllerId, seconds: float) -> None:
        """Gives or renews the lease. Raises FencedError."""
        with self._lock:
            before = self._lease.holder
            taken_over = self._lease.acquire(controller, seconds, time.monotonic())
            self._lease_s = seconds
        if before != controller or self.slot.saved.lease_s != seconds:
            self._say(f"a sidecar has the agent, epoch {controller.epoch}")
            self.slot.save_lease(controller.journal_id, controller.epoch, seconds)
        if taken_over:
            self.slot.end_trials()
            self._loads.end()

    def check(self, controller: ControllerId) -> None:
        """Raises FencedError, LeaseExpiredError."""
        with self._lock:
            self._lease.check(controller, time.monotonic())

    def release(self, controller: ControllerId) -> None:
        """Ends the lease, if ``controller`` holds it."""
        with self._lock:
            self._lease.release(controller)
        self.supervise()

    # Engines

    def start_engine(
        self, controller: ControllerId, request_id: str, engine_id: str, spec: EngineSpec, *, fork: bool, learned: bytes
    ) -> EngineStatus:
        """Raises FencedError, LeaseExpiredError, NotAllowedError, PortTakenError, ForkServerError, OSError."""
        self.check(controller)
        service = self.setup.service
        if service is not None and spec.role is EngineRole.SERVING:
            spec = replace(spec, host=service.host, port=service.port)
        self.setup.allowed.check(spec.model, spec.host, spec.args)
        if service is not None and spec.role is EngineRole.SERVING and dict(spec.args) == dict(service.args):
            spec = replace(service, drain_timeout_s=spec.drain_timeout_s)  # exactly as the operator starts it
        return self._answered.once(
            request_id, lambda: self.slot.start(engine_id, spec, fork=fork and not spec.command, learned=learned)
        )

    def stop_engine(self, controller: ControllerId, request_id: str, engine_id: str, *, drain: bool) -> EngineStatus:
        """Raises FencedError, LeaseExpiredError, UnknownEngineError, NotGoneError."""
        self.check(controller)
        return self._answered.once(request_id, lambda: self.slot.stop(engine_id, EngineLife.STOPPED, drain=drain))

    def show_stacks(self, controller: ControllerId, request_id: str, engine_id: str) -> None:
        """Raises FencedError, LeaseExpiredError, UnknownEngineError."""
        self.check(controller)
        self._answered.once(request_id, lambda: self.slot.show_stacks(engine_id))

    def ask_engine(self, controller: ControllerId, engine_id: str, path: str, body: bytes, timeout_s: float) -> bytes:
        """One HTTP request to an engine. Raises FencedError, LeaseExpiredError, UnknownEngineError, Unanswered."""
        self.check(controller)
        spec = self.slot.spec(engine_id)
        if path not in _PATHS:
            raise Unanswered(f"{path[:80]!r} is not allowed; allowed: {', '.join(sorted(_PATHS))}")
        http = EngineHttp(spec.host, spec.port, self.slot.environment)
        answer = http.send(path, body or None, min(timeout_s, _LONGEST_HTTP_S))
        if path == "/v1/completions":
            self.slot.proven(engine_id)
        return answer

    def prepare_forks(self, controller: ControllerId) -> str:
        """Starts the fork server; returns why it can't fork. Raises FencedError, LeaseExpiredError."""
        self.check(controller)
        self.slot.prepare_forks()
        return self.slot.unforkable

    def end_forks(self, controller: ControllerId) -> None:
        """Raises FencedError, LeaseExpiredError."""
        self.check(controller)
        self.slot.end_forks()

    # Loads

    def prepare_loads(self, controller: ControllerId) -> str:
        """Starts the load client; returns its id. Raises FencedError, LeaseExpiredError, OSError."""
        self.check(controller)
        return self._loads.prepare()

    def run_load(
        self, controller: ControllerId, request_id: str, client_id: str, engine_id: str, order: RunLoad
    ) -> None:
        """Sends a load to an engine.

        Raises FencedError, LeaseExpiredError, UnknownEngineError, UnknownLoadClientError, NotAllowedError, Unanswered,
        OSError.
        """
        self.check(controller)
        check_bench_argv(order.argv, files=self.setup.local)
        spec = self.slot.spec(engine_id)

        def send() -> None:
            http = EngineHttp(spec.host, spec.port, self.slot.environment)
            own = ("--base-url", http.base_url, "--model", http.model(), "--tokenizer", spec.model)
            self._loads.send(client_id, replace(order, argv=(*own, *order.argv)))

        self._answered.once(request_id, send)

    def end_load(self, controller: ControllerId, request_id: str, client_id: str, order: EndLoad) -> None:
        """Raises FencedError, LeaseExpiredError, UnknownLoadClientError, OSError."""
        self.check(controller)
        self._answered.once(request_id, lambda: self._loads.send(client_id, order))

    def read_loads(self, client_id: str, after: int, wait_s: float) -> tuple[list[str], bool]:
        """Raises UnknownLoadClientError."""
        return self._loads.read(client_id, after, wait_s)

    def end_loads(self, controller: ControllerId) -> None:
        """Raises FencedError, LeaseExpiredError."""
        self.check(controller)
        self._loads.end()

    def open_relay(self, controller: ControllerId) -> RelaySession:
        """Raises FencedError, LeaseExpiredError."""
        self.check(controller)
        return self.relay.open()

    # Without a controller

    def supervise(self) -> None:
        """To be called often: ends what an expired lease leaves behind, and restores the service."""
        with self._supervising:
            self._supervise()

    def _supervise(self) -> None:
        self.slot.trim_logs()
        if self.controlled:
            self._restore_at = self._backoff_s = 0.0
            return
        if self.slot.running(EngineRole.TRIAL):
            self.slot.end_trials()
        self.relay.close()
        if self.slot.restored is None or self.slot.running(EngineRole.SERVING):
            return
        if time.monotonic() < self._restore_at:
            return
        self._backoff_s = min(max(self._backoff_s * 2, 1.0), _LONGEST_BACKOFF_S)
        self._say("no sidecar has the agent and no engine serves: the last serving configuration is restarted")
        try:
            self.slot.serve(self.slot.restored)
        except (SlotBusyError, PortTakenError, OSError) as error:
            self._say(f"it did not start: {error}")
        self._restore_at = time.monotonic() + self._backoff_s

    def close(self) -> None:
        """Ends everything but the serving engine."""
        self._loads.end()
        with suppress(OSError):
            self.slot.end_trials()
        self.relay.close()
