"""An engine that an agent runs, with the interface of the sidecar's own."""

from collections.abc import Sequence
from dataclasses import replace

import psutil

from sidecar.engine.agent_client import AgentClient, AgentLost, AgentUnknown, NotStartedByAgent
from sidecar.engine.engine import Engine, EngineCrashed, Launch, port_taken_crash
from vllm_sloguard.agent.engine_http import EngineHttp, Unanswered
from vllm_sloguard.agent.engine_spec import EngineLife, EngineRole, EngineSpec, EngineStatus
from vllm_sloguard.agent.fork_client import ForkServerError
from vllm_sloguard.agent.ports import PortListeners
from vllm_sloguard.agent.process_identity import Identity
from vllm_sloguard.crash import Crash, classify
from vllm_sloguard.wire import agent_pb2 as pb

AGENT_URL = "agent://"


class AgentProcesses:
    """The processes of one engine of an agent."""

    def __init__(self, client: AgentClient, status: EngineStatus) -> None:
        self._client = client
        self.identity: Identity = status.identity
        self._drain_timeout_s = status.spec.drain_timeout_s
        self._last = status

    def status(self) -> EngineStatus:
        """As the agent reports it. Raises AgentLost."""
        if self._last.life is EngineLife.RUNNING:
            try:
                self._last = self._client.engine(self.identity.engine_id)
            except AgentUnknown:
                self._last = replace(self._last, life=EngineLife.LOST)
        return self._last

    def leader_alive(self) -> bool:
        """Whether the engine runs; true also while the agent can't be reached, since it keeps the engine running."""
        try:
            return self.status().life is EngineLife.RUNNING
        except AgentLost:
            return True

    def age_s(self) -> float:
        """0: the agent's clock is not this machine's."""
        return 0.0

    def exit_code(self) -> int | None:
        """None while it runs, and if it is unknown. Raises AgentLost."""
        return self.status().exit_code

    def members(self) -> Sequence[psutil.Process]:
        """None: they are not this machine's."""
        return ()

    def stop(self, grace_s: float) -> None:
        """Drains the engine and ends it. Raises AgentLost."""
        self._end(drain=grace_s > 0)

    def kill(self) -> None:
        """Ends it at once. Raises AgentLost."""
        self._end(drain=False)

    def _end(self, *, drain: bool) -> None:
        try:
            ended = self._client.stop(self.identity.engine_id, drain=drain, drain_timeout_s=self._drain_timeout_s)
        except AgentUnknown:
            return
        self._last = ended

    def show_stacks(self) -> None:
        """Makes its processes write their stacks to its output. Raises AgentLost."""
        self._client.show_stacks(self.identity.engine_id)


class AgentEngineHttp(EngineHttp):
    """An engine's HTTP interface, through its agent; the API key stays there."""

    def __init__(self, client: AgentClient, engine_id: str) -> None:
        super().__init__("127.0.0.1", 0, {})
        self._client = client
        self._engine_id = engine_id
        self.base_url = AGENT_URL + engine_id

    def send(self, path: str, data: bytes | None, timeout_s: float) -> bytes:
        """The answer to a GET, or to a POST of ``data``. Raises Unanswered, AgentLost."""
        try:
            answer = self._client.ask(self._engine_id, path, data or b"", timeout_s)
        except AgentUnknown as error:
            raise Unanswered(str(error)) from None
        if answer.unanswered:
            raise Unanswered(answer.unanswered)
        return answer.body


class AgentEngine(Engine):
    """A vLLM server that an agent runs."""

    def __init__(self, client: AgentClient, launch: Launch, status: EngineStatus) -> None:
        processes = AgentProcesses(client, status)
        super().__init__(launch, processes, AgentEngineHttp(client, status.engine_id))
        self._client = client
        self._processes = processes

    @property
    def forked(self) -> bool:
        """Whether it was forked."""
        return self._processes.status().forked

    @classmethod
    def begin(
        cls, client: AgentClient, launch: Launch, spec: EngineSpec, *, fork: bool, learned: bytes
    ) -> "AgentEngine":
        """Starts vLLM without waiting for it.

        Raises EngineCrashed if the port is taken, ForkServerError if it can't be forked, OSError.
        """
        try:
            return cls(client, launch, client.start(launch.engine_id, spec, fork=fork, learned=learned))
        except NotStartedByAgent as error:
            if error.kind == pb.START_FAILURE_KIND_PORT_TAKEN:
                raise port_taken_crash(
                    launch, error.reason.partition(",")[1] + error.reason.partition(",")[2]
                ) from None
            if error.kind == pb.START_FAILURE_KIND_NOT_FORKED:
                raise ForkServerError(error.reason) from None
            raise

    def listening(self) -> PortListeners | None:
        """Who listens on its port."""
        status = self._client.engine(self.launch.engine_id, ports=True)
        return PortListeners(own=status.owns_port, foreign=status.foreign_on_port)

    def crashed(self, phase: str, *, timed_out: bool = False) -> EngineCrashed:
        """Kills what is left and classifies the crash.

        Raises AgentLost if the engine did not end by itself: the agent ended it, or ended with it.
        """
        life = self._processes.status().life
        if life in (EngineLife.EXPIRED, EngineLife.LOST):
            raise AgentLost(
                "the agent has ended the engine, because the lease had expired"
                if life is EngineLife.EXPIRED
                else "the engine has ended with its agent"
            )
        return super().crashed(phase, timed_out=timed_out)

    def classified(self, phase: str, exit_code: int | None, *, timed_out: bool) -> Crash:
        """The crash, classified from the end of its output. Raises AgentLost."""
        try:
            output = self._client.output(self.launch.engine_id).decode("utf-8", errors="replace")
        except AgentUnknown:
            output = ""
        return classify(output, phase=phase, exit_code=exit_code, timed_out=timed_out)


def role_of(name: str) -> EngineRole:
    """The agent's role for the journal's."""
    return EngineRole.SERVING if name == "serving" else EngineRole.TRIAL
