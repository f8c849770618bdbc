"""The GPUs that CUDA would show to an engine, by NVML, which opens no context on them."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device, a whole GPU or a MIG slice of one.

    ``total_bytes`` is what CUDA calls its memory, without what the driver keeps; ``free_bytes`` what no process holds.
    """

    name: str
    uuid: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Tenant:
    """A process that computes on a device; ``used_bytes`` is None where NVML does not tell, as in some containers."""

    uuid: str
    pid: int
    used_bytes: int | None


def visible(setting: str | None) -> tuple[Gpu, ...]:
    """The devices that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; none without NVML or without a GPU."""
    return _asked(lambda nvml: selected(tuple(_devices(nvml)), setting)) or ()


def tenants(devices: Iterable[Gpu]) -> tuple[Tenant, ...] | None:
    """The processes on ``devices``; None where NVML does not tell."""
    return _asked(lambda nvml: tuple(t for gpu in devices for t in _tenants(nvml, gpu.uuid)))


def _tenants(nvml: Any, uuid: str) -> Iterator[Tenant]:
    for process in nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByUUID(uuid)):
        used = process.usedGpuMemory
        yield Tenant(uuid, int(process.pid), None if used is None else int(used))


def driver() -> str | None:
    """The version of NVIDIA's driver; None without NVML or without a GPU."""
    return _asked(lambda nvml: _text(nvml.nvmlSystemGetDriverVersion()))


def _asked(question: Callable[[Any], _Answer]) -> _Answer | None:
    """NVML's answer; None where it has none."""
    try:
        # By name: it has no types, and nothing else needs it.
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        return question(nvml)
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def selected(devices: tuple[tuple[Gpu, ...], ...], setting: str | None) -> tuple[Gpu, ...]:
    """What ``setting`` chooses of ``devices``: each GPU, or the slices of one in MIG mode.

    Entries are indices of GPUs, or beginnings of a UUID, of a GPU or of a slice; CUDA stops at the first that names no
    device. It shows a process one slice of a GPU in MIG mode, the first where none is named (NVIDIA's MIG guide).
    """
    firsts = tuple(slices[0] for slices in devices if slices)
    if setting is None:
        return firsts
    chosen: dict[str, Gpu] = {}
    for entry in (entry.strip() for entry in setting.split(",")):
        if entry.isdecimal():
            found = firsts[int(entry)] if int(entry) < len(firsts) else None
        else:
            named = (gpu for slices in devices for gpu in slices if gpu.uuid.startswith(entry))
            found = next(named, None) if entry.startswith(("GPU-", "MIG-")) else None
        if found is None:
            break
        chosen[found.uuid] = found
    return tuple(chosen.values())


def _devices(nvml: Any) -> Iterator[tuple[Gpu, ...]]:
    for index in range(int(nvml.nvmlDeviceGetCount())):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        slices = tuple(_gpu(nvml, slice_) for slice_ in _slices(nvml, handle))
        yield slices or (_gpu(nvml, handle),)


def _slices(nvml: Any, handle: Any) -> Iterator[Any]:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(handle)
        count = int(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)) if current else 0
    except nvml.NVMLError:  # a GPU that knows no MIG
        return
    for index in range(count):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except nvml.NVMLError:  # a place that no slice fills
            continue


def _gpu(nvml: Any, handle: Any) -> Gpu:
    memory = _memory(nvml, handle)
    return Gpu(
        _text(nvml.nvmlDeviceGetName(handle)),
        _text(nvml.nvmlDeviceGetUUID(handle)),
        # On an H200 NVML's total is 0.6 GiB, 0.4%, above CUDA's, by just what the driver reserves.
        int(memory.total) - int(getattr(memory, "reserved", 0)),
        int(memory.free),
    )


def _memory(nvml: Any, handle: Any) -> Any:
    """The second version of the answer says what is reserved; older drivers know only the first."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (AttributeError, nvml.NVMLError):
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
