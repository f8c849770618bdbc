"""The engines of one agent: one serves or is tried at a time, all are found again by the agent's successor.

The agent restores the serving engine itself when no controller holds the lease (see ``restore``). Thread-safe: starts
and stops are made one at a time, and what is read does not wait for them.
"""

import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_sloguard.agent.engine_spec import EngineLife, EngineRole, EngineSpec, EngineStatus, SavedEngine, SavedState
from vllm_sloguard.agent.fork_client import ForkServer, ForkServerError, unforkable
from vllm_sloguard.agent.ports import any_free_port, listeners, port_free, port_owner
from vllm_sloguard.agent.process_group import NotGoneError, ProcessGroup, socket_folder
from vllm_sloguard.agent.process_identity import ENGINE_ID_VARIABLE, output_of
from vllm_sloguard.agent.serve_command import command_line, entry, server_arguments
from vllm_sloguard.agent.state_file import AgentFolder

_MAX_ENDED = 50
_STOP_GRACE_S = 10.0
_MAX_LOG_BYTES = 2**26
_KERNELS_VARIABLE = "TRITON_CACHE_DIR"


class UnknownEngineError(KeyError):
    """The agent has no such engine."""


class SlotBusyError(RuntimeError):
    """Another engine of the agent runs."""


class PortTakenError(RuntimeError):
    """Something else listens on the port."""


@dataclass
class _Held:
    """An engine that the agent knows."""

    spec: EngineSpec
    group: ProcessGroup
    detached: bool
    forked: bool = False
    by_agent: bool = False
    life: EngineLife = EngineLife.RUNNING
    exit_code: int | None = None


class EngineSlot:
    """``environment`` is that of the engines: secrets in it never leave this process."""

    def __init__(
        self,
        python: str,
        environment: Mapping[str, str],
        folder: AgentFolder,
        say: Callable[[str], None],
        *,
        keep_kernels: bool = True,
    ) -> None:
        self._python = python
        self._environment = dict(environment)
        self._folder = folder
        self._say = say
        self._keep_kernels = keep_kernels
        self._changing = threading.RLock()
        self._engines: OrderedDict[str, _Held] = OrderedDict()
        self._forks = ForkServer(python, self._environment, folder.path, folder.other_log("fork-server"))
        self.unforkable = ""
        self.restored: EngineSpec | None = None
        self.saved = SavedState()

    # Reading

    def status(self, engine_id: str, *, ports: bool = False) -> EngineStatus:
        """One engine; with ``ports``, also who listens on its port. Raises UnknownEngineError."""
        return self._status(engine_id, self._held(engine_id), ports=ports)

    def spec(self, engine_id: str) -> EngineSpec:
        """What an engine runs. Raises UnknownEngineError."""
        return self._held(engine_id).spec

    def all(self) -> list[EngineStatus]:
        """All running engines, and the last ones that ended."""
        return [self._status(engine_id, held, ports=False) for engine_id, held in list(self._engines.items())]

    def serving(self) -> EngineStatus | None:
        """The latest serving engine, even if it has ended."""
        return next((one for one in reversed(self.all()) if one.spec.role is EngineRole.SERVING), None)

    def running(self, role: EngineRole) -> list[str]:
        """The ids of the running engines of ``role``."""
        return [one.engine_id for one in self.all() if one.spec.role is role and one.life is EngineLife.RUNNING]

    def log(self, engine_id: str) -> Path:
        """The output of an engine. Raises UnknownEngineError."""
        self._held(engine_id)
        return self._folder.log(engine_id)

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment of the engines; never sent."""
        return self._environment

    def engine_pids(self) -> set[int]:
        """All processes of the running engines."""
        running = [held for held in list(self._engines.values()) if held.life is EngineLife.RUNNING]
        return {member.pid for held in running for member in held.group.members()}

    def _held(self, engine_id: str) -> _Held:
        try:
            return self._engines[engine_id]
        except KeyError:
            raise UnknownEngineError(f"there is no engine {engine_id!r}") from None

    def _status(self, engine_id: str, held: _Held, *, ports: bool) -> EngineStatus:
        self._notice_exit(held)
        listening = None
        if ports and held.life is EngineLife.RUNNING:
            pids = [member.pid for member in held.group.members()]
            listening = listeners(held.spec.host, held.spec.port, pids)
        return EngineStatus(
            engine_id,
            held.spec,
            held.group.identity,
            held.life,
            held.exit_code,
            foreign_on_port=listening is not None and listening.foreign,
            owns_port=listening is not None and listening.own,
            forked=held.forked,
            by_agent=held.by_agent,
        )

    @staticmethod
    def _notice_exit(held: _Held) -> None:
        if held.life is EngineLife.RUNNING and not held.group.leader_alive():
            held.exit_code = held.group.exit_code()
            held.life = EngineLife.EXITED

    # Starting

    def start(self, engine_id: str, spec: EngineSpec, *, fork: bool = False, learned: bytes = b"") -> EngineStatus:
        """Starts or forks an engine, without waiting for it.

        Raises SlotBusyError, PortTakenError, ForkServerError if it was to be forked and can't be, OSError.
        """
        with self._changing:
            if running := [*self.running(EngineRole.SERVING), *self.running(EngineRole.TRIAL)]:
                raise SlotBusyError(f"engine {running[0]} runs; it has to be stopped first")
            if not spec.port:
                spec = replace(spec, port=any_free_port())
            if not port_free(spec.host, spec.port):
                raise PortTakenError(f"{spec.host}:{spec.port}{port_owner(spec.port)}")
            if learned:
                with suppress(OSError):  # a full disk must not keep the service from starting
                    self._folder.learned.write_bytes(learned)
            environment = self._engine_environment(engine_id, spec)
            socket_folder(engine_id).mkdir(mode=0o700, exist_ok=True)
            group = self._fork(spec, engine_id, environment) if fork else self._spawn(spec, engine_id, environment)
            detached = not fork or spec.role is EngineRole.SERVING
            if fork and detached:
                group = self._detached(group)
            self._engines[engine_id] = _Held(spec, group, detached, forked=fork)
            self._forget_old()
            self._save()
            return self.status(engine_id)

    def _spawn(self, spec: EngineSpec, engine_id: str, environment: Mapping[str, str]) -> ProcessGroup:
        log = self._folder.log(engine_id)
        command = spec.command or command_line(self._python, spec.model, spec.all_args)
        # The command line of an existing service may name files relative to where it was started.
        folder = Path.cwd() if spec.command else log.parent
        return ProcessGroup.start(command, engine_id, log, environment, folder)

    def _fork(self, spec: EngineSpec, engine_id: str, environment: Mapping[str, str]) -> ProcessGroup:
        if self.unforkable or unforkable(spec.args):
            raise ForkServerError(self.unforkable or unforkable(spec.args))
        log = self._folder.log(engine_id)
        argv = server_arguments(self._python, spec.model, spec.all_args)
        try:
            forked = self._forks.fork(entry(self._python).module, argv, environment, log, log.parent)
        except ForkServerError as error:
            self.unforkable = str(error)
            raise
        return ProcessGroup.of_child(forked, engine_id)

    def _detached(self, group: ProcessGroup) -> ProcessGroup:
        """Makes a forked engine outlive the fork server. Raises ForkServerError."""
        try:
            self._forks.detach(group.identity.pid)
        except ForkServerError:
            group.kill()
            raise
        return ProcessGroup(group.identity)

    def _engine_environment(self, engine_id: str, spec: EngineSpec) -> dict[str, str]:
        own = {
            ENGINE_ID_VARIABLE: engine_id,
            "VLLM_RPC_BASE_PATH": str(socket_folder(engine_id)),
            "SLOGUARD_SOCKET": str(self._folder.plugin_socket),
            "SLOGUARD_REPAIR": "on" if spec.repair else "off",
            "SLOGUARD_IMPORTS": str(self._folder.path),
            "SLOGUARD_LEARNED": str(self._folder.learned),
            "SLOGUARD_WORKLOAD_MAX_LEN": str(spec.longest_request_tokens),
        }
        keep = self._keep_kernels and not spec.command
        kernels = {_KERNELS_VARIABLE: str(self._folder.kernels)} if keep else {}
        return {**kernels, **self._environment, **own}

    # Ending

    def stop(self, engine_id: str, life: EngineLife, *, drain: bool) -> EngineStatus:
        """Ends an engine and waits until it is gone. Raises UnknownEngineError, NotGoneError."""
        held = self._held(engine_id)
        self._notice_exit(held)
        if held.life is EngineLife.RUNNING:
            held.life = life  # before its exit can be taken for a crash
        held.group.stop(held.spec.drain_timeout_s + _STOP_GRACE_S if drain else 0.0)
        held.exit_code = held.exit_code if held.exit_code is not None else held.group.exit_code()
        with self._changing:
            self._save()
        return self.status(engine_id)

    def show_stacks(self, engine_id: str) -> None:
        """Makes the engine's processes write their stacks to its output. Raises UnknownEngineError."""
        self._held(engine_id).group.show_stacks()

    def pass_on(self, engine_id: str, number: int) -> None:
        """Sends a signal to an engine's first process. Raises UnknownEngineError."""
        self._held(engine_id).group.signal_leader(number)

    def end_leftovers(self, engine_id: str) -> None:
        """Kills what an engine's first process has left behind. Raises UnknownEngineError."""
        with suppress(NotGoneError):
            self._held(engine_id).group.kill()
        with self._changing:
            self._save()

    def child_pids(self) -> set[int]:
        """Processes whose exit codes are still to be read by the one that started them."""
        return {held.group.identity.pid for held in list(self._engines.values())} | self._forks.pids()

    def end_trials(self) -> None:
        """Ends what belongs to a controller that is gone: its trial engines, and the fork server."""
        for engine_id in self.running(EngineRole.TRIAL):
            self._say(f"engine {engine_id} is ended: its controller is gone")
            with suppress(NotGoneError):
                self.stop(engine_id, EngineLife.EXPIRED, drain=False)
        self.end_forks()

    def prepare_forks(self) -> None:
        """Starts the fork server, without waiting for it."""
        with self._changing:
            if not self.unforkable:
                try:
                    self._forks.warm_up()
                except ForkServerError as error:
                    self.unforkable = str(error)

    def end_forks(self) -> None:
        """Ends the fork server, and the forked engines that do not serve."""
        with self._changing:
            self._forks.close()

    # Serving without a controller

    def serve(self, spec: EngineSpec) -> EngineStatus:
        """Starts ``spec`` and makes it what is restored. Raises SlotBusyError, PortTakenError, OSError."""
        self.restored = spec
        engine_id = uuid.uuid4().hex[:12]
        self.start(engine_id, spec)
        self._held(engine_id).by_agent = True
        with self._changing:
            self._save()
        return self.status(engine_id)

    def proven(self, engine_id: str) -> None:
        """Notes that an engine has answered: a serving one is from now on what is restored."""
        held = self._held(engine_id)
        if held.spec.role is EngineRole.SERVING and self.restored != held.spec:
            self.restored = held.spec
            with self._changing:
                self._save()

    # The state file

    def take_over(self, saved: SavedState) -> None:
        """Takes over the engines of an earlier agent, and ends those that were to end with it.

        The folder may be a copy of one that is in use: engines that do not write to its logs are left alone.
        """
        self.saved, self.restored = saved, saved.restored
        for engine_id, one in saved.engines.items():
            group = ProcessGroup(one.identity)
            if group.leader_alive() and not self._writes_here(one.identity.pid):
                self._say(f"an engine of another folder (process {one.identity.pid}) is left running")
                continue
            held = self._engines[engine_id] = _Held(one.spec, group, one.detached, by_agent=one.by_agent)
            if not group.leader_alive():
                held.life = EngineLife.LOST
                group.kill()
        self._save()

    def _writes_here(self, pid: int) -> bool:
        try:
            return output_of(pid).parent == self._folder.log("").parent.resolve()
        except OSError:
            return False

    def save_lease(self, journal_id: str, epoch: int, lease_s: float) -> None:
        """Notes the controller, for the agent's successor."""
        with self._changing:
            self.saved = replace(self.saved, journal_id=journal_id, epoch=epoch, lease_s=lease_s)
            self._save()

    def _save(self) -> None:
        running = {
            engine_id: SavedEngine(held.spec, held.group.identity, held.detached, held.by_agent)
            for engine_id, held in self._engines.items()
            if held.life is EngineLife.RUNNING
        }
        self.saved = replace(self.saved, engines=running, restored=self.restored)
        try:
            self._folder.save(self.saved)
        except OSError as error:
            self._say(f"the state file can't be written: {error}")

    def _forget_old(self) -> None:
        ended = [engine_id for engine_id, held in self._engines.items() if held.life is not EngineLife.RUNNING]
        for engine_id in ended[:-_MAX_ENDED]:
            del self._engines[engine_id]
            self._folder.log(engine_id).unlink(missing_ok=True)

    def trim_logs(self) -> None:
        """Truncates large logs; vLLM opens them for append, so writing continues at the start."""
        for engine_id in list(self._engines):
            log = self._folder.log(engine_id)
            with suppress(FileNotFoundError):
                if log.stat().st_size > _MAX_LOG_BYTES:
                    os.truncate(log, 0)
