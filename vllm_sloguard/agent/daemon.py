"""The agent's main loop: signals, the service of its command line, the lease, orphans.

The service comes first: the engine of the command line is started before anything else, and trouble with the agent's
own folder or address is logged, not fatal, once it runs.
"""

import os
import queue
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import grpc

from vllm_sloguard.agent.agent import Agent
from vllm_sloguard.agent.engine_spec import EngineLife, EngineStatus
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.agent.listen import TlsFileError, listen
from vllm_sloguard.agent.machine_facts import MachineFacts
from vllm_sloguard.agent.options import AgentOptions
from vllm_sloguard.agent.output_copy import OutputCopy
from vllm_sloguard.agent.private_files import private_files
from vllm_sloguard.agent.slot import PortTakenError, SlotBusyError
from vllm_sloguard.agent.state_file import AgentFolderError
from vllm_sloguard.agent.zombies import OrphanReaper
from vllm_sloguard.wire.agent_pb2_grpc import add_AgentServiceServicer_to_server
from vllm_sloguard.wire.environment_pb2_grpc import add_EnvironmentServiceServicer_to_server

_TICK_S = 0.1
_REAP_EVERY_S = 2.0
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def run_agent(options: AgentOptions, say: Callable[[str], None]) -> int:
    """Runs the agent; returns its exit code. The process ends by the signal that ended vLLM, if one did."""
    folder = options.setup.folder
    try:
        folder.create()
        lock = folder.lock()
    except AgentFolderError as error:
        say(str(error))
        return 1
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in _PASSED_ON:
        signal.signal(number, _receiver(signals))
    with private_files(folder.path):
        agent = Agent(options.setup, os.environ, say)
        try:
            return _Daemon(options, agent, signals, say).run()
        finally:
            agent.close()
            os.close(lock)


def _receiver(signals: "queue.SimpleQueue[int]") -> Callable[[int, FrameType | None], None]:
    def receive(number: int, _frame: FrameType | None) -> None:
        signals.put(number)

    return receive


class _Daemon:
    """The running agent."""

    def __init__(
        self, options: AgentOptions, agent: Agent, signals: "queue.SimpleQueue[int]", say: Callable[[str], None]
    ) -> None:
        self._options = options
        self._agent = agent
        self._signals = signals
        self._say = say
        self._service = options.setup.service
        self._servers: list[grpc.Server] = []
        self._ending = False
        self._output = OutputCopy(sys.stdout.fileno()) if self._service is not None else None

    def run(self) -> int:
        """Until a signal, or the end of the service."""
        plugins = serve_unix_socket(self._options.setup.folder.plugin_socket, self._agent.relay.add_to)
        self._servers.append(plugins)
        if self._service is not None and (code := self._start_service()) is not None:
            return code
        try:
            self._listen()
        except (TlsFileError, OSError) as error:
            bad_option = isinstance(error, TlsFileError)
            self._say(str(error) if bad_option else f"--listen: {error}")
            if self._service is None:
                return 2 if bad_option else 1
            self._say("the service keeps running, but can't be tuned")
        try:
            return self._loop()
        finally:
            for stopped in [server.stop(grace=0.5) for server in self._servers]:
                stopped.wait(2)

    def _start_service(self) -> int | None:
        """Starts the service, unless an earlier agent left it running; the exit code if it can't be started."""
        assert self._service is not None
        slot = self._agent.slot
        serving = slot.serving()
        if serving is not None and serving.life is EngineLife.RUNNING:
            self._say(f"the service runs already: process {serving.identity.pid}")
            if slot.restored is None:
                slot.restored = self._service
            return None
        try:
            slot.serve(self._service)
        except FileNotFoundError as error:
            self._say(f"{error.filename}: command not found")
            return 127
        except PermissionError as error:
            self._say(f"{error.filename}: not executable")
            return 126
        except (SlotBusyError, PortTakenError, OSError) as error:
            self._say(f"the service did not start: {error}")
            return 1
        return None

    def _listen(self) -> None:
        from vllm_sloguard.agent.environment_on_demand import EnvironmentOnDemand
        from vllm_sloguard.agent.servicer import AgentServicer

        facts = MachineFacts(self._options.setup.python, self._agent.slot.environment)

        def register(server: grpc.Server) -> None:
            add_AgentServiceServicer_to_server(AgentServicer(self._agent, facts), server)
            add_EnvironmentServiceServicer_to_server(EnvironmentOnDemand(self._agent), server)

        self._servers.append(listen(self._options.address, self._options.tls, register))
        self._say(f"listening on {self._options.address.text}")

    def _loop(self) -> int:
        reaper, reap_at = OrphanReaper(self._agent.slot.child_pids), 0.0
        while True:
            try:
                number = self._signals.get(timeout=_TICK_S)
            except queue.Empty:
                pass
            else:
                if (code := self._signalled(number)) is not None:
                    return code
            if time.monotonic() >= reap_at:
                reap_at = time.monotonic() + _REAP_EVERY_S
                reaper.reap()
            if (code := self._supervise()) is not None:
                return code

    def _signalled(self, number: int) -> int | None:
        """Passes a signal on to the service; the exit code if there is nothing to wait for."""
        serving = self._serving()
        if self._service is None:
            # The engine serves on without an agent, until one adopts it.
            return 0 if number in _ENDING else None
        if number in _ENDING:
            self._ending = True
            self._agent.close()
        if serving is None or serving.life is not EngineLife.RUNNING:
            return 0 if self._ending else None
        self._agent.slot.pass_on(serving.engine_id, number)
        return None

    def _serving(self) -> EngineStatus | None:
        return self._agent.slot.serving()

    def _supervise(self) -> int | None:
        """Supervises; the exit code if the service has ended."""
        serving = self._serving()
        if self._output is not None and serving is not None:
            self._output.follow(self._agent.slot.log(serving.engine_id))
        ended = serving is not None and serving.life is EngineLife.EXITED
        if self._service is not None and ended and (self._ending or not self._agent.controlled):
            assert serving is not None
            return self._end_with(serving)
        if not self._ending:
            self._agent.supervise()
        return None

    def _end_with(self, serving: EngineStatus) -> int:
        """Ends what is left of the service, and returns its exit code."""
        self._agent.slot.end_leftovers(serving.engine_id)
        if self._output is not None:
            self._output.finish(self._agent.slot.log(serving.engine_id))
        code = serving.exit_code
        if code is None:  # a process that an earlier agent started
            return 1
        if code < 0:
            self._agent.close()
            _die_of(-code)
            return 128 - code
        return code


def _die_of(number: int) -> None:
    """Ends this process by the signal that ended the service; returns where that is not possible, as for PID 1."""
    with suppress(OSError, ValueError):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    with suppress(OSError):
        os.kill(os.getpid(), number)
    time.sleep(0.2)
