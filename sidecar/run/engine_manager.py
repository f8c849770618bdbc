"""The sidecar's engines: started, stopped and found again, each recorded in the journal."""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sidecar.config.schema import Config
from sidecar.engine.engine import Engine, EngineCrashed, Launch
from sidecar.engine.live_knobs import LiveHub
from sidecar.guard.memory_learning import Learning
from sidecar.guard.model_builds import model_of
from sidecar.measure.load_client import GeneratorProcess
from sidecar.observe.telemetry import TelemetryHub
from sidecar.record.journal import EngineRecord, JournalError, Superseded
from sidecar.record.trial import RepairChange, StartKind
from sidecar.run.orphans import Orphans, option_value, started_to_serve
from vllm_sloguard.agent.fork_client import ForkServer, ForkServerError, unforkable
from vllm_sloguard.agent.ports import any_free_port
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.agent.process_identity import Identity, command_words, leader_of, log_of
from vllm_sloguard.agent.serve_command import server_arguments
from vllm_sloguard.crash import Crash
from vllm_sloguard.guard import machine
from vllm_sloguard.guard.known_model import KnownModel
from vllm_sloguard.knobs import Value

LOGS = "logs"
KERNELS = "kernels"
_KERNELS_VARIABLE = "TRITON_CACHE_DIR"


class EngineManager:
    """Starts engines: for trials on a free port, for serving on the operator's.

    Engines are forked if configured and possible; otherwise the reason is logged once, and every later start is an
    ordinary one.
    """

    def __init__(  # noqa: PLR0917 - what an engine has to do with
        self,
        config: Config,
        learning: Learning,
        hub: TelemetryHub,
        live: LiveHub,
        expect_traffic: Callable[[str, str], None],
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._learning = learning
        self._journal = learning.journal
        self._hub = hub
        self._live = live
        self._expect_traffic = expect_traffic
        self._say = say
        logs = config.state / LOGS
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.orphans = Orphans(self._journal, logs, say)
        engine = config.engine
        environment = {**os.environ, **engine.env}
        self._forks = engine.forked_trials or engine.forked_serving
        self._fork_server = ForkServer(engine.python, environment, config.state, logs / "fork-server.log")

    def act_for(self, epoch: int) -> None:
        """Acts as the controller of ``epoch`` from now on; engines of this machine need no permission."""

    def act_without_journal(self) -> None:
        """Controls the engines of this machine while the journal can't be written: serving takes priority."""

    def load_generator(self) -> GeneratorProcess | None:
        """The process that sends the loads where the engines are; None for this machine."""
        return None

    def machine(self, ranks: int) -> machine.Machine:
        """The memory of the engines' machine now. Raises OSError."""
        return machine.observe({**os.environ, **self._config.engine.env}, ranks=ranks)

    def known_model(self) -> KnownModel:
        """What the engines' machine says of the model."""
        return model_of(self._config.model, self._config.engine.python)

    @property
    def outlive_sidecar(self) -> bool:
        """Whether the serving engine keeps running when the sidecar is stopped by the operator."""
        return False

    def close(self) -> None:
        """Ends what belongs to this sidecar, except the engines."""
        self.end_forks()

    # Starts

    def trial_launch(self, args: Mapping[str, Any], *, repair: bool) -> Launch:
        """A launch on a free port."""
        return self._launch(args, "127.0.0.1", any_free_port(), repair=repair)

    def serving_launch(self, args: Mapping[str, Any]) -> Launch:
        """A launch on the operator's host and port."""
        return self._own_serving_launch(args)

    def _own_serving_launch(self, args: Mapping[str, Any]) -> Launch:
        """As ``serving_launch``, without an agent."""
        engine = self._config.engine
        launch = self._launch(args, engine.host, engine.port, repair=True)
        return replace(launch, drain_timeout_s=engine.drain_timeout_s)

    def warm_up_forks(self) -> None:
        """Starts the fork server without waiting for it."""
        if self._forks:
            try:
                self._fork_server.warm_up()
            except ForkServerError as error:
                self.fork_no_more(str(error))

    def end_forks(self) -> None:
        """Stops the fork server until it is needed again, and with it the forked engines that are not detached."""
        self._fork_server.close()

    def fork_no_more(self, why: str) -> None:
        """Uses ordinary starts from now on; logged once."""
        if self._forks:
            self._say(f"forked starts are disabled: {why}")
            self._fork_server.close()
            self._forks = False

    def begin(self, launch: Launch, role: str, *, fork: bool) -> tuple[Engine, StartKind]:
        """Starts an engine without waiting for it, forked if requested and possible.

        Raises EngineCrashed when the port is taken, OSError, JournalError.
        """
        if fork and self._forks and not unforkable(launch.args):
            try:
                return self._start(launch, role, fork=True), StartKind.FORKED
            except ForkServerError as error:
                self.fork_no_more(str(error))
        return self._start(launch, role, fork=False), StartKind.ORDINARY

    def serve(self, args: Mapping[str, Any], began: Callable[[Engine], None], cancelled: Callable[[], bool]) -> Engine:
        """An engine that serves on the operator's port; ``began`` is called with it before its first token.

        Raises EngineCrashed, Cancelled, OSError.
        """
        restored = self._restored(args)
        if restored is not None:
            engine, start = restored, StartKind.ORDINARY
        else:
            engine, start = self.begin(self.serving_launch(args), "serving", fork=self._config.engine.forked_serving)
        began(engine)
        try:
            engine.wait_ready(self._config.engine.start_timeout_s, cancelled)
        except EngineCrashed:
            if start is StartKind.ORDINARY:
                raise
            # The fork may be to blame, so the serving configuration gets an ordinary start.
            self.end(engine, drain=False)
            self.fork_no_more("the serving configuration crashed on a forked engine")
            return self.serve(args, began, cancelled)
        if start is StartKind.FORKED:
            engine = self._detached_engine(engine)
        self.end_forks()
        return engine

    def _restored(self, _args: Mapping[str, Any]) -> Engine | None:
        """An engine that an agent has started to serve ``args``; None without an agent."""
        return None

    def _detached_engine(self, engine: Engine) -> Engine:
        """Detaches ``engine``, so that it outlives the fork server and the sidecar. Raises OSError."""
        try:
            self._fork_server.detach(engine.group.identity.pid)
        except ForkServerError as error:
            self.fork_no_more(str(error))
            raise OSError(f"the engine may have ended with the fork server: {error}") from None
        return Engine.adopt(engine.launch, engine.group.identity)

    def _launch(self, args: Mapping[str, Any], host: str, port: int, *, repair: bool) -> Launch:
        engine_id = uuid.uuid4().hex[:12]
        engine = self._config.engine
        env = {
            **engine.env,
            "SLOGUARD_SOCKET": str(self._config.socket),
            "SLOGUARD_REPAIR": "on" if repair else "off",
            "SLOGUARD_LEARNED": str(self._learning.path),
            "SLOGUARD_IMPORTS": str(self._config.state),
            "SLOGUARD_WORKLOAD_MAX_LEN": str(self._config.workload.longest_request_tokens),
        }
        if engine.keep_kernels and _KERNELS_VARIABLE not in {**os.environ, **engine.env}:
            kernels = self._config.state / KERNELS
            kernels.mkdir(exist_ok=True, mode=0o700)
            env[_KERNELS_VARIABLE] = str(kernels)
        log = log_of(self._config.state / LOGS, engine_id)
        return Launch(engine_id, engine.python, self._config.model, dict(args), host, port, env, log)

    def _start(self, launch: Launch, role: str, *, fork: bool) -> Engine:
        """Recorded in the journal before and after, so that the engine can always be found again."""
        self._expect(launch, role)
        # Serving takes priority over recording: a full disk stops trials, not the service.
        try:
            self._journal.engine_starting(launch.engine_id, role, known(launch))
        except JournalError:
            if role != "serving":
                raise
        try:
            engine = self._process(launch, role, fork=fork)
        except (EngineCrashed, ForkServerError, OSError):
            with suppress(JournalError):
                self._journal.engine_gone(launch.engine_id)
            raise
        try:
            self._journal.engine_started(engine.group.identity)
        except Superseded:
            engine.group.kill()
            raise
        except JournalError:
            if role != "serving":
                engine.group.kill()
                raise
        return engine

    def _process(self, launch: Launch, _role: str, *, fork: bool) -> Engine:
        """A new engine. Raises EngineCrashed if the port is taken, ForkServerError, OSError."""
        return Engine.start(launch, self._fork_server if fork else None)

    def _expect(self, launch: Launch, role: str) -> None:
        """Registers an engine for telemetry and live changes."""
        cores = launch.args.get("data_parallel_size", 1)
        self._hub.expect(launch.engine_id)
        self._live.expect(launch.engine_id, cores if isinstance(cores, int) else 1)
        self._expect_traffic(launch.engine_id, role)

    def end(self, engine: Engine, *, drain: bool) -> float:
        """Stops an engine, waits until it is gone, and returns the seconds taken."""
        began = time.monotonic()
        if drain:
            engine.stop()
        else:
            engine.group.kill()
        with suppress(JournalError):  # the next start of the sidecar notices that it is gone
            self._journal.engine_gone(engine.launch.engine_id)
        return time.monotonic() - began

    def adopt(self, record: EngineRecord, args: Mapping[str, Any]) -> Engine | None:
        """The engine of ``record``, if it was started exactly as ``args`` would be started now."""
        return self._adopt_own(record, args)

    def _adopt_own(self, record: EngineRecord, args: Mapping[str, Any]) -> Engine | None:
        """As ``adopt``, for an engine that was started without an agent."""
        log = Path(record.launch["log"])
        launch = replace(self._own_serving_launch(args), engine_id=record.identity.engine_id, log=log)
        # Logs are read and truncated: only touch those in the state folder.
        own = log.resolve().parent == (self._config.state / LOGS).resolve()
        if record.role != "serving" or record.launch != known(launch) or not own:
            return None
        self._expect(launch, record.role)
        return Engine.adopt(launch, self._found(record))

    def _found(self, record: EngineRecord) -> Identity:
        """The identity of a recorded engine, even if it was started in the moment before its pid was recorded."""
        if record.identity.pid > 0:
            return record.identity
        found = leader_of(record.identity.engine_id)
        if found is None:
            return record.identity
        with suppress(JournalError):
            self._journal.engine_started(found)
        return found

    def record_alone(self, engine: Engine | None) -> None:
        """Records ``engine`` as the only running serving engine. Raises JournalError."""
        recorded = {record.identity.engine_id for record in self._journal.engines()}
        for engine_id in recorded - ({engine.launch.engine_id} if engine is not None else set()):
            self._journal.engine_gone(engine_id)
        if engine is not None:
            if engine.launch.engine_id not in recorded:
                self._journal.engine_starting(engine.launch.engine_id, "serving", known(engine.launch))
            self._journal.engine_started(engine.group.identity)

    def serving_process(self) -> int | None:
        """The process of an engine that serves, recorded or not, without taking it over."""
        for record in self._journal.engines():
            if record.role == "serving" and ProcessGroup(record.identity).leader_alive():
                return record.identity.pid
        found = self.unrecorded_serving(self._config.engine.args)
        if found is not None:
            return found.engine.group.identity.pid
        unrecorded = self.orphans.unrecorded().values()
        return next((leader.pid for leader in unrecorded if started_to_serve(leader.pid)), None)

    def unrecorded_serving(self, args: Mapping[str, Any]) -> "UnrecordedEngine | None":
        """The engine on the operator's port without a row in the journal."""
        return self._unrecorded_own(args)

    def _unrecorded_own(self, args: Mapping[str, Any]) -> "UnrecordedEngine | None":
        """As ``unrecorded_serving``, for an engine that was started without an agent, or whose agent lost its files."""
        launch = self._own_serving_launch(args)
        for engine_id, leader in self.orphans.unrecorded().items():
            if leader.pid < 0:
                continue
            engine = Engine.adopt(
                replace(launch, engine_id=engine_id, log=log_of(self._config.state / LOGS, engine_id)), leader
            )
            words, expected = command_words(leader.pid), server_arguments(launch.python, launch.model, launch.all_args)
            if engine.owns_port() or option_value(words, "--port") == str(launch.port):
                self._expect(engine.launch, "serving")
                return UnrecordedEngine(engine, matches=words[-len(expected) :] == expected)
        return None

    # Reports from engines

    def learn(self, launch: Launch, crash: Crash | None = None, *, started: bool = True) -> None:
        """Stores an engine's memory report; a failure to do so blocks neither trials nor the service."""
        changes = {change.name: change.after for change in self.repairs(launch)}
        args = {name: value for name, value in {**launch.args, **changes}.items() if value is not None}
        telemetry = self._hub.of(launch.engine_id)
        with suppress(JournalError, OSError):
            if started:
                self._learning.started(args, telemetry)
            if crash is not None:
                self._learning.crashed(args, telemetry, crash)

    def repairs(self, launch: Launch) -> tuple[RepairChange, ...]:
        """The repairs that the plugin made inside an engine."""
        report = self._hub.of(launch.engine_id).repair
        changes = report.changes if report is not None else ()
        return tuple(
            RepairChange(c.name, _value(c.from_value), _value(c.to_value), c.reason, (*c.rules,)) for c in changes
        )


@dataclass(frozen=True)
class UnrecordedEngine:
    """A serving engine without a row in the journal, and whether its launch matches the journal's configuration."""

    engine: Engine
    matches: bool


def known(launch: Launch) -> dict[str, Any]:
    """A launch as recorded in the journal: everything that affects it, with the environment (secrets) as a digest."""
    env = hashlib.sha256(json.dumps(sorted(launch.env.items())).encode()).hexdigest()[:16]
    return {
        "python": launch.python,
        "model": launch.model,
        "args": dict(launch.args),
        "host": launch.host,
        "port": launch.port,
        "drain_timeout_s": launch.drain_timeout_s,
        "env": env,
        "log": str(launch.log),
    }


def _value(text: str) -> Value | None:
    """The value of an argument, which the plugin sends as JSON; invalid JSON is kept as text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if value is None or isinstance(value, bool | int | float | str) else text
