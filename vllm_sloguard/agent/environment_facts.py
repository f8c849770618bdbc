"""Facts about the environment of the engines: vLLM, the devices, shared memory, the model's files."""

from dataclasses import dataclass

from vllm_sloguard.agent.python_env import Packages

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
class EnvironmentFacts:
    """All of them."""

    vllm: VllmFacts
    devices: Devices
    shm: Shm | None
    model: ModelFacts | None = None
