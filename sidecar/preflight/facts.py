"""The facts that `sloguard doctor` collects; sidecar.preflight.doctor judges them."""

from dataclasses import dataclass

from sidecar.preflight.python_env import Packages

SHM = "/dev/shm"  # noqa: S108 - where Linux has it


@dataclass(frozen=True)
class Imports:
    """What happened when vLLM and its benchmark client were imported; errors are empty if it worked."""

    seconds: float
    vllm_error: str
    client_error: str


@dataclass(frozen=True)
class VllmFacts:
    """The Python of vLLM. ``plugins_setting`` is VLLM_PLUGINS as its engines will see it, None if unset."""

    python: str
    packages: Packages | None
    error: str
    plugins_setting: str | None
    sidecar_version: str
    imports: Imports | None = None
    fork_error: str | None = None  # empty where forking works


@dataclass(frozen=True)
class Devices:
    """``driver_files``: whether the kernel has the NVIDIA driver. ``tenants`` are processes other than our own.

    They are None if NVML does not list processes.
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
    """Shared memory, bytes; ``ranks`` is the number of an engine's processes that communicate through it."""

    total_bytes: int
    free_bytes: int
    ranks: int


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
class ModelFacts:
    """``local``: the field names a local folder; ``path``: it looks like a path.

    ``offline`` is the variable that forbids downloads, if the model is not in the Hugging Face cache.
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
    """All facts. ``plan_problem`` is the reason why a window could not run as configured.

    ``config_warnings`` are suspicious values in the file.
    """

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
    misspelt: tuple[tuple[str, str], ...] = ()  # unknown name in engine.args, and the likely correction
    plan_problem: str | None = None
    config_warnings: tuple[str, ...] = ()
