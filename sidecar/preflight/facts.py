"""What `sloguard doctor` has looked at: plain facts, which sidecar.preflight.doctor judges."""

from dataclasses import dataclass

from sidecar.preflight.python_env import Packages

SHM = "/dev/shm"  # noqa: S108 - where Linux has it


@dataclass(frozen=True)
class Imports:
    """What happened when vLLM and its benchmark client were imported; errors are empty where it worked."""

    seconds: float
    vllm_error: str
    client_error: str


@dataclass(frozen=True)
class VllmFacts:
    """The Python of vLLM. ``plugins_setting`` is VLLM_PLUGINS as its engines will have it, None where it is not set."""

    python: str
    packages: Packages | None
    error: str
    plugins_setting: str | None
    sidecar_version: str
    imports: Imports | None = None
    fork_error: str | None = None  # empty where forking works


@dataclass(frozen=True)
class Devices:
    """``driver_files`` says whether the kernel has NVIDIA's driver; ``tenants`` are processes that are none of ours.

    They are None where NVML does not tell of any.
    """

    kind: str
    names: tuple[str, ...]
    mig: bool
    total_bytes: int
    free_bytes: int
    driver_files: bool
    tenants: tuple[tuple[int, int | None], ...] | None  # process id, bytes
    error: str = ""


@dataclass(frozen=True)
class Shm:
    """The memory that processes share, bytes; ``ranks`` are those of an engine that talk over it."""

    total_bytes: int
    free_bytes: int
    ranks: int


@dataclass(frozen=True)
class Port:
    """Where something of ours listens, or is to. ``owner`` is who has it, in words; ``ours`` whether that is us."""

    field: str
    host: str
    port: int
    free: bool
    ours: bool
    owner: str


@dataclass(frozen=True)
class StateFolderFacts:
    """The state folder, or the nearest one above it where it is not made yet. ``write_error`` is of a real write."""

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
    """The sidecar that holds the folder. ``answered_epoch`` is what it says, None where it does not answer."""

    pid: int | None
    journal_epoch: int
    answered_epoch: int | None
    error: str


@dataclass(frozen=True)
class Scrape:
    """The metrics page, as it answers; and where its address was given, Prometheus's target of us with its health.

    ``url`` is empty where there is no file that says it.
    """

    url: str
    expected: bool
    error: str
    prometheus: str = ""
    prometheus_error: str = ""
    target: str = ""
    health: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """``local`` is whether the field names a folder here, ``path`` whether it looks as if it meant one.

    ``offline`` is the variable that forbids to fetch it, where one does and the hub's cache has it not.
    """

    name: str
    local: bool
    path: bool
    config_error: str
    tokenizer: bool
    weights: bool
    offline: str = ""


@dataclass(frozen=True)
class HostFacts:
    """Everything that was looked at. ``plan_problem`` is why a window could not run as configured."""

    config_error: str | None
    vllm: VllmFacts
    devices: Devices
    shm: Shm | None
    ports: tuple[Port, ...] = ()
    state: StateFolderFacts | None = None
    link: SidecarFacts | None = None
    scrape: Scrape | None = None
    model: ModelFacts | None = None
    hooks: tuple[tuple[str, str, bool], ...] = ()  # field, command, whether it is there
    next_window: str | None = None
    misspelt: tuple[tuple[str, str], ...] = ()  # what engine.args has, and what it looks like
    plan_problem: str | None = None
