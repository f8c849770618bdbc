"""The engines of an agent: started, stopped and found again under its lease, each recorded in the journal."""

import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sidecar.config.schema import Config, ConfigError
from sidecar.engine.agent_client import AgentClient, AgentFacts, AgentLost, AgentRefused, journal_id_of
from sidecar.engine.agent_engine import AgentEngine, role_of
from sidecar.engine.agent_environment import AgentEnvironment
from sidecar.engine.agent_relay import AgentRelay
from sidecar.engine.engine import Engine, Launch
from sidecar.engine.live_knobs import LiveHub
from sidecar.engine.local_agent import LocalAgent
from sidecar.guard.agent_models import model_at_agent
from sidecar.guard.memory_learning import Learning
from sidecar.measure.agent_generator import AgentGenerator
from sidecar.measure.load_client import GeneratorProcess
from sidecar.observe.telemetry import TelemetryHub
from sidecar.record.journal import EngineRecord, Journal, JournalError
from sidecar.run.engine_manager import LOGS, EngineManager, UnrecordedEngine, known
from sidecar.run.orphans import Orphans
from vllm_sloguard.agent.engine_spec import EngineLife, EngineRole, EngineSpec, EngineStatus
from vllm_sloguard.agent.listen import TlsFileError, TlsFiles
from vllm_sloguard.agent.process_identity import Identity
from vllm_sloguard.guard.known_model import KnownModel
from vllm_sloguard.guard.machine import Machine


def open_client(
    config: Config, address: str, journal_id: str, say: Callable[[str], None], patience_s: float | None
) -> AgentClient:
    """A client of the agent at ``address``, which may not answer. Raises ConfigError."""
    engine = config.engine
    tls = engine.agent_tls
    files = TlsFiles(tls.certificate, tls.key, tls.ca) if tls is not None else None
    try:
        return AgentClient(address, files, journal_id, say, lease_s=engine.agent_lease_s, patience_s=patience_s)
    except TlsFileError as error:
        raise ConfigError(str(error)) from None


def connect(config: Config, address: str, say: Callable[[str], None]) -> AgentClient:
    """A client of the agent at ``address``, which can run the engines. Raises ConfigError, AgentLost, OSError."""
    config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    client = open_client(config, address, journal_id_of(config.state), say, None)
    try:
        check_service(config, client.facts())
    except BaseException:
        client.close()
        raise
    return client


@contextmanager
def agent_client(config: Config, say: Callable[[str], None]) -> Generator[AgentClient | None]:
    """The client of the file's agent, None without one; a local agent is started, and ended afterwards.

    Raises ConfigError, AgentLost, OSError.
    """
    if config.engine.watch_only or not config.engine.agents:
        yield None
    elif config.engine.agent_address:
        yield connect(config, config.engine.agent_address, say)
    else:
        agent = LocalAgent(config, say)
        agent.start()
        try:
            yield connect(config, agent.address, say)
        finally:
            agent.close()


def check_service(config: Config, facts: AgentFacts) -> None:
    """Raises ConfigError unless the service that the agent was started with is the incumbent of the file."""
    if facts.untunable:
        raise ConfigError(f"engine.agents: the agent's service can't be tuned: {facts.untunable}")
    service = facts.restored if facts.command else None
    if service is None:
        return
    if service.model != config.model:
        raise ConfigError(f"model: {config.model!r}: the agent's command line serves {service.model!r}; write the same")
    if service.port != config.engine.port:
        raise ConfigError(
            f"engine.port: {config.engine.port}: the agent's command line has {service.port}; write the same"
        )


def known_to_agent(client: AgentClient, model: str) -> KnownModel:
    """What an agent's files and its vLLM say of ``model``. Raises AgentLost, AgentRefused."""
    return model_at_agent(AgentEnvironment(client, model), client.facts(versions=True).vllm_version)


class AgentEngineManager(EngineManager):
    """As EngineManager, for engines that an agent runs."""

    def __init__(  # noqa: PLR0917 - as EngineManager
        self,
        config: Config,
        learning: Learning,
        hub: TelemetryHub,
        live: LiveHub,
        expect_traffic: Callable[[str, str], None],
        say: Callable[[str], None],
        client: AgentClient,
    ) -> None:
        super().__init__(config, learning, hub, live, expect_traffic, say)
        self._client = client
        self._local = config.engine.local_agent
        self.orphans: AgentOrphans = AgentOrphans(self._journal, client, config.state / LOGS, say)
        self._relay = AgentRelay(client, config.socket)

    def act_for(self, epoch: int) -> None:
        """Takes the agent as the controller of ``epoch``. Raises AgentTaken, AgentLost."""
        if self._local:
            # The journal may be an older copy, or not be writable; the state folder's lock makes this the only sidecar.
            epoch = max(epoch, self._client.facts().last_epoch + 1)
        self._client.act_for(epoch)
        self._relay.start()

    def act_without_journal(self) -> None:
        """As in EngineManager, at a local agent; another one may belong to a newer sidecar. Raises AgentLost."""
        if self._local:
            self.act_for(0)

    def load_generator(self) -> GeneratorProcess:
        """The agent's."""
        return AgentGenerator(self._client)

    def machine(self, ranks: int) -> Machine:
        """The memory of the agent's machine now. Raises OSError."""
        return self._client.machine(ranks)

    def known_model(self) -> KnownModel:
        """What the agent says of the model. Raises AgentLost, AgentRefused."""
        return known_to_agent(self._client, self._config.model)

    @property
    def outlive_sidecar(self) -> bool:
        """Another agent keeps it running; a local one ends with the sidecar."""
        return not self._local

    def close(self) -> None:
        """Gives the agent back, which restores the service if no engine serves; a local agent is not to restore it."""
        with suppress(AgentLost, AgentRefused):
            self.end_forks()
        self._relay.close()
        self._client.close(release=self.outlive_sidecar)

    # Starts

    def trial_launch(self, args: Mapping[str, Any], *, repair: bool) -> Launch:
        """A launch on a port that the agent chooses."""
        return self._agent_launch(args, "127.0.0.1", 0, repair=repair)

    def serving_launch(self, args: Mapping[str, Any]) -> Launch:
        """A launch on the operator's host and port, at the agent."""
        engine = self._config.engine
        launch = self._agent_launch(args, engine.host, engine.port, repair=True)
        return replace(launch, drain_timeout_s=engine.drain_timeout_s)

    def _agent_launch(self, args: Mapping[str, Any], host: str, port: int, *, repair: bool) -> Launch:
        settings, python = {"SLOGUARD_REPAIR": "on" if repair else "off"}, ""
        if self._local:  # an engine that was started with others is not adopted
            settings, python = {**self._config.engine.env, **settings}, self._config.engine.python
        log = Path(self._client.boot)
        return Launch(uuid.uuid4().hex[:12], python, self._config.model, dict(args), host, port, settings, log)

    def warm_up_forks(self) -> None:
        """Starts the agent's fork server without waiting for it. Raises AgentLost."""
        if self._forks and (why := self._client.prepare_forks()):
            self.fork_no_more(why)

    def end_forks(self) -> None:
        """Ends the agent's fork server, and the forked engines that do not serve. Raises AgentLost."""
        if self._forks:
            self._client.end_forks()

    def _restored(self, args: Mapping[str, Any]) -> Engine | None:
        """The engine that the agent has started by itself, if it runs ``args``; anything else it runs is stopped."""
        found = self._unrecorded_at_agent(args)
        found = found if found is not None and found.matches else None
        self.orphans.end_at_agent(keep=found.engine.launch.engine_id if found is not None else "")
        if found is None:
            return None
        with suppress(JournalError):  # reported where the state is written
            self.record_alone(found.engine)
        return found.engine

    def _detached_engine(self, engine: Engine) -> Engine:
        """The agent keeps it."""
        return engine

    def _process(self, launch: Launch, role: str, *, fork: bool) -> Engine:
        """As in EngineManager, at the agent."""
        spec = EngineSpec(
            launch.model,
            launch.args,
            launch.host,
            launch.port,
            role_of(role),
            launch.drain_timeout_s,
            launch.env["SLOGUARD_REPAIR"] == "on",
            self._config.workload.longest_request_tokens,
        )
        return AgentEngine.begin(self._client, launch, spec, fork=fork, learned=self._learned())

    def _learned(self) -> bytes:
        try:
            return self._learning.path.read_bytes()
        except OSError:
            return b""

    def adopt(self, record: EngineRecord, args: Mapping[str, Any]) -> Engine | None:
        """The engine of ``record``, if it was started exactly as ``args`` would be started now. Raises AgentLost."""
        at_agent = record.launch.get("log") == str(Path(self._client.boot))
        if self._local and not at_agent:
            return self._adopt_own(record, args)
        launch = replace(self.serving_launch(args), engine_id=record.identity.engine_id)
        if record.role != "serving" or record.launch != known(launch):
            return None
        status = running_engines(self._client).get(launch.engine_id)
        if status is None:
            return None
        if record.identity != status.identity:  # recorded before the process was
            with suppress(JournalError):
                self._journal.engine_started(status.identity)
        self._expect(launch, record.role)
        return AgentEngine(self._client, launch, status)

    def serving_process(self) -> int | None:
        """The process of the agent's serving engine, in its own process namespace. Raises AgentLost."""
        serving = (one for one in running_engines(self._client).values() if one.spec.role is EngineRole.SERVING)
        pid = next((one.identity.pid for one in serving), None)
        return super().serving_process() if pid is None and self._local else pid

    def unrecorded_serving(self, args: Mapping[str, Any]) -> UnrecordedEngine | None:
        """The serving engine without a row in the journal. Raises AgentLost."""
        found = self._unrecorded_at_agent(args)
        return self._unrecorded_own(args) if found is None and self._local else found

    def _unrecorded_at_agent(self, args: Mapping[str, Any]) -> UnrecordedEngine | None:
        """The agent's serving engine without a row in the journal.

        It is replaced unless it runs ``args``; except at a local agent, if a sidecar has started it: this journal is an
        older copy then.
        """
        recorded = {record.identity.engine_id for record in self._journal.engines()}
        for engine_id, status in running_engines(self._client).items():
            if status.spec.role is not EngineRole.SERVING or engine_id in recorded:
                continue
            launch = replace(self.serving_launch(args), engine_id=engine_id)
            matches = _runs(status.spec, launch)
            if matches or (self._local and not status.by_agent):
                self._expect(launch, "serving")
                return UnrecordedEngine(AgentEngine(self._client, launch, status), matches=matches)
        return None


class AgentOrphans(Orphans):
    """The engines of an agent that this sidecar did not start."""

    def __init__(self, journal: Journal, client: AgentClient, logs: Path, say: Callable[[str], None]) -> None:
        super().__init__(journal, logs, say)
        self._client = client

    def unrecorded(self) -> dict[str, Identity]:
        """Those that neither the journal nor the agent knows. Raises AgentLost."""
        agents = running_engines(self._client)
        return {engine_id: leader for engine_id, leader in super().unrecorded().items() if engine_id not in agents}

    def end(self, keep: str = "") -> list[str]:
        """Ends the agent's engines, and those that were started without it, except ``keep``. Raises AgentLost."""
        return [*self._stop_at_agent(keep), *super().end(keep)]

    def end_at_agent(self, keep: str) -> None:
        """Ends the agent's engines except ``keep``. Raises AgentLost."""
        self._stop_at_agent(keep)
        for record in self._journal.engines():
            if record.identity.remote and record.identity.engine_id != keep:
                with suppress(JournalError):  # the next start of the sidecar notices that it is gone
                    self._journal.engine_gone(record.identity.engine_id)

    def _stop_at_agent(self, keep: str) -> list[str]:
        ended: list[str] = []
        for engine_id, status in running_engines(self._client).items():
            if engine_id != keep:
                serving = status.spec.role is EngineRole.SERVING
                self._client.stop(engine_id, drain=serving, drain_timeout_s=status.spec.drain_timeout_s)
                ended.append(engine_id)
        return ended


def _runs(spec: EngineSpec, launch: Launch) -> bool:
    found = (spec.model, dict(spec.args), spec.host, spec.port)
    return found == (launch.model, dict(launch.args), launch.host, launch.port)


def running_engines(client: AgentClient) -> dict[str, EngineStatus]:
    """The engines of an agent that run, by their ids. Raises AgentLost."""
    return {one.engine_id: one for one in client.facts().engines if one.life is EngineLife.RUNNING}
