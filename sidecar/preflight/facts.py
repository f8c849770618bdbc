"""The facts that `sloguard doctor` collects; sidecar.preflight.doctor judges them."""

from dataclasses import dataclass

from vllm_sloguard.agent.environment_facts import Devices, ModelFacts, Shm, VllmFacts


@dataclass(frozen=True)
class Port:
    """An address to listen on. ``owner`` is the process that uses it, as text; ``ours``: it is the sidecar's."""

    field: str
    host: str
    port: int
    free: bool
    ours: bool
    owner: str


@dataclass(frozen=True)
class StateFolderFacts:
    """The state folder, or its nearest existing parent. ``write_error`` is of a test write."""

    path: str
    exists: bool
    folder: bool
    owner: int
    user: int
    mode: int
    write_error: str
    free_bytes: int
    journal_error: str
    socket_bytes: int
    most_socket_bytes: int


@dataclass(frozen=True)
class SidecarFacts:
    """The sidecar that holds the folder. ``answered_epoch`` is None if it does not answer."""

    pid: int | None
    journal_epoch: int
    answered_epoch: int | None
    error: str


@dataclass(frozen=True)
class Scrape:
    """Whether the metrics page answers, and, if its address was given, Prometheus' target for it with its health.

    ``url`` is empty without a configuration file.
    """

    url: str
    expected: bool
    error: str
    prometheus: str = ""
    prometheus_error: str = ""
    target: str = ""
    health: str = ""


@dataclass(frozen=True)
class AgentReach:
    """Whether the agent answers; ``error`` is empty if it does."""

    address: str
    error: str = ""


@dataclass(frozen=True)
class HostFacts:
    """All facts. ``plan_problem`` is the reason why a window could not run as configured.

    ``config_warnings`` are suspicious values in the file. ``vllm``, ``devices``, ``shm`` and ``model`` are of the
    agent's machine where there is an agent.
    """

    config_error: str | None
    vllm: VllmFacts | None = None
    devices: Devices | None = None
    shm: Shm | None = None
    agent: AgentReach | None = None
    ports: tuple[Port, ...] = ()
    state: StateFolderFacts | None = None
    link: SidecarFacts | None = None
    scrape: Scrape | None = None
    model: ModelFacts | None = None
    hooks: tuple[tuple[str, str, bool], ...] = ()  # field, command, whether it is there
    next_window: str | None = None
    misspelt: tuple[tuple[str, str], ...] = ()  # unknown name in engine.args, and the likely correction
    plan_problem: str | None = None
    config_warnings: tuple[str, ...] = ()
