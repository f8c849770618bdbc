"""Client of the agent that runs the engines: typed calls with deadlines and retries, and the lease.

All calls may be repeated (see agent.proto), so what a cut link leaves open is sent again until ``patience_s`` is over.
"""

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from vllm_sloguard.agent.engine_spec import EngineSpec, EngineStatus
from vllm_sloguard.agent.lease import ControllerId
from vllm_sloguard.agent.listen import TlsFiles, private_file, read_address, tls_file
from vllm_sloguard.agent.messages import controller_to_wire, machine_from_wire, spec_to_wire, status_from_wire
from vllm_sloguard.agent.process_identity import agent_boot
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.hooks.telemetry_client import unix_target
from vllm_sloguard.wire import agent_pb2 as pb
from vllm_sloguard.wire.agent_pb2_grpc import AgentServiceStub

MessageT = TypeVar("MessageT")

_LEASE_S = 10.0
_RENEWALS = 5  # in the time of one lease
_CALL_S = 10.0
_PATIENCE = 1.5  # times the lease
_RETRY_S = 0.2
_FORK_S = 250.0  # the fork server's imports, and the fork
_KILL_S = 90.0
_MAX_ANSWER_BYTES = 2**27
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A new channel is a new connection: the old one may be half-closed.
    ("grpc.use_local_subchannel_pool", 1),
]


class AgentLost(OSError):  # noqa: N818 - it names what happened
    """The agent can't be reached, or has ended what it ran because the lease expired."""


class AgentTaken(AgentLost):
    """Another sidecar has the agent."""


class AgentRefused(OSError):  # noqa: N818 - it names what happened
    """The agent does not allow, or can't do, what was requested."""


class AgentUnknown(AgentRefused):
    """The agent does not know the engine or load client."""


class NotStartedByAgent(OSError):  # noqa: N818 - it names what happened
    """No process was started; ``kind`` says why."""

    def __init__(self, kind: "pb.StartFailureKind", reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True)
class AgentFacts:
    """What an agent reports of itself.

    ``restored`` is what it starts when no sidecar has it; ``last_epoch`` that of the latest sidecar with this journal,
    0 without one.
    """

    agent_id: str
    vllm_version: str
    engines: tuple[EngineStatus, ...]
    restored: EngineSpec | None
    command: tuple[str, ...]
    untunable: str
    last_epoch: int


class AgentClient:
    """One agent, as seen by one sidecar. ``journal_id`` identifies the sidecar's journal.

    Calls are repeated for ``patience_s`` while the agent can't be reached; one and a half leases by default.
    """

    def __init__(
        self,
        address: str,
        tls: TlsFiles | None,
        journal_id: str,
        say: Callable[[str], None],
        *,
        lease_s: float = _LEASE_S,
        patience_s: float | None = None,
    ) -> None:
        self.address = address
        self._parsed = read_address(address)
        self._credentials = None if self._parsed.socket is not None else _credentials(tls, address)
        self._journal_id = journal_id
        self._say = say
        self._lease_s = lease_s
        self._patience_s = _PATIENCE * lease_s if patience_s is None else patience_s
        self._channel = self._open()
        self._epoch = 0
        self._ended = threading.Event()
        self._keeper: threading.Thread | None = None
        self._lock = threading.Lock()

    def _open(self) -> grpc.Channel:
        if self._parsed.socket is not None:
            return grpc.insecure_channel(unix_target(str(self._parsed.socket)), options=_OPTIONS)
        assert self._credentials is not None
        return grpc.secure_channel(self._parsed.target, self._credentials, options=_OPTIONS)

    @property
    def channel(self) -> grpc.Channel:
        """The current connection; replaced when the agent does not answer."""
        return self._channel

    @property
    def controller(self) -> pb.Controller:
        """This sidecar."""
        return controller_to_wire(ControllerId(self._journal_id, self._epoch))

    # The lease

    def act_for(self, epoch: int) -> None:
        """Takes the agent as the controller of ``epoch``, and keeps the lease. Raises AgentTaken, AgentLost."""
        self._epoch = epoch
        self._acquire()
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep, name="sloguard-lease", daemon=True)
            self._keeper.start()

    def _acquire(self) -> None:
        request = pb.AcquireRequest(controller=self.controller, lease_seconds=self._lease_s)
        self.call(lambda stub: stub.Acquire, request)

    def _keep(self) -> None:
        while not self._ended.wait(self._lease_s / _RENEWALS):
            request = pb.AcquireRequest(controller=self.controller, lease_seconds=self._lease_s)
            try:
                AgentServiceStub(self._channel).Acquire(request, timeout=self._lease_s)
            except grpc.RpcError as error:
                if _code(error) is grpc.StatusCode.DEADLINE_EXCEEDED:
                    self._reconnect(self._channel)

    def close(self, *, release: bool = True) -> None:
        """Closes the connection; gives the lease back if ``release`` and the agent can be reached."""
        self._ended.set()
        if self._epoch and release:
            try:
                AgentServiceStub(self._channel).Release(pb.ReleaseRequest(controller=self.controller), timeout=2.0)
            except grpc.RpcError:
                self._say(f"the agent {self.address} can't be reached: its lease ends in {self._lease_s:.0f} s")
        self._channel.close()

    # Calls

    def call(
        self,
        method: Callable[[AgentServiceStub], Callable[..., MessageT]],
        request: Any,
        timeout_s: float = _CALL_S,
    ) -> MessageT:
        """The answer, after retries. Raises AgentLost, AgentTaken, AgentRefused, AgentUnknown."""
        return self.call_on_channel(lambda channel: method(AgentServiceStub(channel)), request, timeout_s)

    def call_on_channel(
        self, method: Callable[[grpc.Channel], Callable[..., MessageT]], request: Any, timeout_s: float = _CALL_S
    ) -> MessageT:
        """As ``call``, for any service of the agent."""
        deadline = time.monotonic() + self._patience_s
        while True:
            channel = self._channel
            try:
                return method(channel)(request, timeout=timeout_s)
            except ValueError:  # the channel was replaced meanwhile
                pass
            except grpc.RpcError as error:
                self._check(error, channel)
                if time.monotonic() > deadline:
                    raise AgentLost(f"the agent {self.address} can't be reached: {_text(error)}") from None
            if self._ended.wait(_RETRY_S):
                raise AgentLost(f"the connection to the agent {self.address} is closed")

    def _check(self, error: grpc.RpcError, channel: grpc.Channel) -> None:
        """Returns if the call may be sent again. Raises AgentLost, AgentTaken, AgentUnknown, AgentRefused."""
        code = _code(error)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._reconnect(channel)
        elif code is grpc.StatusCode.ABORTED:  # the agent has ended what ran under the lease
            self._acquire()
            raise AgentLost(f"the lease of the agent {self.address} had expired") from None
        elif code is grpc.StatusCode.FAILED_PRECONDITION:
            raise AgentTaken(f"the agent {self.address}: {_text(error)}") from None
        elif code is grpc.StatusCode.NOT_FOUND:
            raise AgentUnknown(f"the agent {self.address}: {_text(error)}") from None
        elif code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED):
            raise AgentRefused(f"the agent {self.address}: {_text(error)}") from None

    def _reconnect(self, channel: grpc.Channel) -> None:
        """Replaces a connection on which the agent does not answer."""
        with self._lock:
            if self._channel is channel and not self._ended.is_set():
                self._channel = self._open()
                # Calls under way on the old one may still be answered.
                threading.Timer(_CALL_S, channel.close).start()

    # Reports

    def facts(self, *, versions: bool = False) -> AgentFacts:
        """What the agent reports; the version of vLLM only with ``versions``. Raises AgentLost."""
        found = self.call(lambda stub: stub.Describe, pb.DescribeRequest(versions=versions))
        return AgentFacts(
            found.agent_id,
            found.vllm_version,
            tuple(status_from_wire(one, self.boot) for one in found.engines),
            status_from_wire(_as_state(found.restored), self.boot).spec if found.HasField("restored") else None,
            tuple(found.command),
            found.untunable,
            found.controller.epoch if found.controller.journal_id == self._journal_id else 0,
        )

    def machine(self, ranks: int) -> Machine:
        """The memory of the agent's machine now. Raises AgentLost, OSError if the agent can't read it."""
        return self.machine_and_held(ranks, held=False)[0]

    def machine_and_held(self, ranks: int, *, held: bool = True) -> tuple[Machine, int]:
        """Also the bytes of it that the agent's engines use. Raises as ``machine``."""
        found = self.call(lambda stub: stub.Describe, pb.DescribeRequest(ranks=ranks, held=held))
        if not found.HasField("machine"):
            raise OSError(f"the agent {self.address} can't read its machine's memory")
        return machine_from_wire(found.machine), found.held_bytes

    @property
    def boot(self) -> str:
        """Stands for the boot id in identities of its processes, which are not this machine's."""
        return agent_boot(self.address)

    def engine(self, engine_id: str, *, ports: bool = False) -> EngineStatus:
        """One engine. Raises AgentUnknown, AgentLost."""
        found = self.call(lambda stub: stub.GetEngine, pb.GetEngineRequest(engine_id=engine_id, ports=ports))
        return status_from_wire(found.engine, self.boot)

    def output(self, engine_id: str) -> bytes:
        """The end of an engine's output. Raises AgentUnknown, AgentLost."""
        return self.call(lambda stub: stub.ReadOutput, pb.ReadOutputRequest(engine_id=engine_id)).output

    # Engines

    def start(self, engine_id: str, spec: EngineSpec, *, fork: bool, learned: bytes) -> EngineStatus:
        """Starts an engine. Raises NotStartedByAgent, AgentRefused, AgentLost."""
        request = pb.StartEngineRequest(
            controller=self.controller,
            request_id=uuid.uuid4().hex,
            engine_id=engine_id,
            spec=spec_to_wire(spec),
            fork=fork,
            learned=learned,
        )
        found = self.call(lambda stub: stub.StartEngine, request, _FORK_S if fork else _KILL_S)
        if found.HasField("failure"):
            raise NotStartedByAgent(found.failure.kind, found.failure.reason)
        return status_from_wire(found.started, self.boot)

    def stop(self, engine_id: str, *, drain: bool, drain_timeout_s: float = 0.0) -> EngineStatus:
        """Ends an engine. Raises AgentUnknown, AgentRefused, AgentLost."""
        request = pb.StopEngineRequest(
            controller=self.controller, request_id=uuid.uuid4().hex, engine_id=engine_id, drain=drain
        )
        found = self.call(lambda stub: stub.StopEngine, request, _KILL_S + (drain_timeout_s if drain else 0.0))
        return status_from_wire(found.engine, self.boot)

    def show_stacks(self, engine_id: str) -> None:
        """Makes an engine's processes write their stacks to its output. Raises AgentUnknown, AgentLost."""
        request = pb.DumpStacksRequest(controller=self.controller, request_id=uuid.uuid4().hex, engine_id=engine_id)
        self.call(lambda stub: stub.DumpStacks, request)

    def ask(self, engine_id: str, path: str, body: bytes, timeout_s: float) -> pb.AskEngineResponse:
        """One HTTP request to an engine. Raises AgentUnknown, AgentLost."""
        request = pb.AskEngineRequest(
            controller=self.controller, engine_id=engine_id, path=path, body=body, timeout_seconds=timeout_s
        )
        return self.call(lambda stub: stub.AskEngine, request, timeout_s + _CALL_S)

    def prepare_forks(self) -> str:
        """Starts the fork server; returns why nothing can be forked. Raises AgentLost."""
        return self.call(lambda stub: stub.PrepareForks, pb.PrepareForksRequest(controller=self.controller)).unforkable

    def end_forks(self) -> None:
        """Ends the fork server. Raises AgentLost."""
        self.call(lambda stub: stub.EndForks, pb.EndForksRequest(controller=self.controller))


def _as_state(spec: pb.EngineSpec) -> pb.EngineState:
    return pb.EngineState(spec=spec, life=pb.ENGINE_LIFE_STOPPED)


def _credentials(tls: TlsFiles | None, address: str) -> grpc.ChannelCredentials:
    if tls is None:
        raise AgentRefused(f"{address}: TCP needs mutual TLS: set engine.agent_tls")
    return grpc.ssl_channel_credentials(
        tls_file("engine.agent_tls.ca", tls.ca),
        private_file("engine.agent_tls.key", tls.key),
        tls_file("engine.agent_tls.certificate", tls.certificate),
    )


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    code = getattr(error, "code", None)
    return code() if code is not None else grpc.StatusCode.UNKNOWN


def _text(error: grpc.RpcError) -> str:
    details = getattr(error, "details", None)
    return " ".join(str(details() if details is not None else error).split())[:500]


def journal_id_of(state: Path) -> str:
    """The id of a state folder's journal, made on first use. Raises OSError."""
    path = state / "journal.id"
    try:
        return path.read_text(encoding="ascii").strip() or _new_id(path)
    except FileNotFoundError:
        return _new_id(path)


def _new_id(path: Path) -> str:
    made = uuid.uuid4().hex
    path.write_text(made + "\n", encoding="ascii")
    return made
