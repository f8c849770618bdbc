"""Where the engines of a configuration run: this machine, or an agent's."""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from sidecar.config.schema import Config
from sidecar.engine.agent_client import AgentClient
from sidecar.engine.agent_environment import AgentEnvironment
from sidecar.format import Say
from sidecar.guard.model_builds import model_of
from sidecar.preflight.engine_memory import Own, machine_without
from sidecar.run.agent_engines import known_to_agent, open_client
from vllm_sloguard import __version__
from vllm_sloguard.agent.environment_facts import EnvironmentFacts
from vllm_sloguard.agent.environment_probe import ProbeRequest, probe_environment
from vllm_sloguard.agent.python_env import UnusablePythonError, packages
from vllm_sloguard.guard.known_model import KnownModel
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.start_history import ranks_of

_PATIENCE_S = 3.0


class EngineHost(Protocol):
    """What the machine with the engines says; every method may raise OSError.

    ``own`` are the processes of this sidecar's engines; an agent knows its own ones.
    """

    def machine_without(self, own: Own, args: Mapping[str, object]) -> tuple[Machine, int]:
        """The machine as a trial with ``args`` would see it, and what running engines use of its memory, in bytes."""
        ...

    def vllm_version(self) -> str:
        """Empty if vLLM is not installed there."""
        ...

    def known_model(self) -> KnownModel:
        """What is known of the model."""
        ...

    def inspect(self, own: Own, say: Say, *, imports: bool) -> EnvironmentFacts:
        """The environment of the engines; ``imports`` to import vLLM, too."""
        ...


@contextmanager
def engine_host(config: Config) -> Generator[EngineHost]:
    """The host of ``config``. Raises ConfigError."""
    if not config.engine.agent_address:
        yield _ThisMachine(config)
        return
    client = open_client(config, config.engine.agent_address, "", lambda _: None, _PATIENCE_S)
    try:
        yield _AgentMachine(config, client)
    finally:
        client.close()


def _forks(config: Config) -> bool:
    return config.engine.forked_trials or config.engine.forked_serving


class _ThisMachine:
    def __init__(self, config: Config) -> None:
        self._config = config

    def machine_without(self, own: Own, args: Mapping[str, object]) -> tuple[Machine, int]:
        return machine_without(own, self._config, args)

    def vllm_version(self) -> str:
        try:
            return packages(self._config.engine.python).vllm
        except UnusablePythonError:  # `sloguard doctor` says more
            return ""

    def known_model(self) -> KnownModel:
        return model_of(self._config.model, self._config.engine.python)

    def inspect(self, own: Own, say: Say, *, imports: bool) -> EnvironmentFacts:
        engine = self._config.engine
        request = ProbeRequest(self._config.model, engine.args, imports, _forks(self._config))
        return probe_environment(request, engine.python, {**os.environ, **engine.env}, own.pids, say)


class _AgentMachine:
    def __init__(self, config: Config, client: AgentClient) -> None:
        self._config = config
        self._client = client

    def machine_without(self, own: Own, args: Mapping[str, object]) -> tuple[Machine, int]:
        found, held = self._client.machine_and_held(ranks_of(args))
        return replace(found, free_bytes=min(found.total_bytes, found.free_bytes + held)), held

    def vllm_version(self) -> str:
        return self._client.facts(versions=True).vllm_version

    def known_model(self) -> KnownModel:
        return known_to_agent(self._client, self._config.model)

    def inspect(self, own: Own, say: Say, *, imports: bool) -> EnvironmentFacts:
        say("asking the agent")
        environment = AgentEnvironment(self._client, self._config.model)
        found = environment.inspect(self._config.engine.args, imports=imports, forks=_forks(self._config))
        return replace(found, vllm=replace(found.vllm, sidecar_version=__version__))
