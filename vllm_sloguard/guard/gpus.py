"""The GPUs visible to an engine, queried through NVML, which creates no CUDA context."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device, a whole GPU or a MIG slice of one.

    ``total_bytes`` is the total reported by CUDA, without the driver's reserve; ``free_bytes`` is unallocated.
    """

    name: str
    uuid: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Tenant:
    """A compute process on a device; ``used_bytes`` is None if NVML does not report it, as in some containers."""

    uuid: str
    pid: int
    used_bytes: int | None


def visible(setting: str | None) -> tuple[Gpu, ...]:
    """The devices selected by ``CUDA_VISIBLE_DEVICES``, in its order; empty without NVML or without a GPU."""
    return _asked(lambda nvml: selected(tuple(_devices(nvml)), setting)) or ()


def tenants(devices: Iterable[Gpu]) -> tuple[Tenant, ...] | None:
    """The processes on ``devices``; None if NVML does not list them."""
    return _asked(lambda nvml: tuple(t for gpu in devices for t in _tenants(nvml, gpu.uuid)))


def _tenants(nvml: Any, uuid: str) -> Iterator[Tenant]:
    for process in nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByUUID(uuid)):
        used = process.usedGpuMemory
        yield Tenant(uuid, int(process.pid), None if used is None else int(used))


def driver() -> str | None:
    """The version of NVIDIA's driver; None without NVML or without a GPU."""
    return _asked(lambda nvml: _text(nvml.nvmlSystemGetDriverVersion()))


def _asked(question: Callable[[Any], _Answer]) -> _Answer | None:
    """NVML's answer; None if the query fails."""
    try:
        # Imported by name because it has no type information.
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
    """The devices selected by ``setting``: GPUs, or slices of a GPU in MIG mode.

    Entries are GPU indices or UUID prefixes of a GPU or slice; CUDA stops at the first invalid entry. In MIG mode a
    process sees one slice only, by default the first (NVIDIA's MIG guide).
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
    except nvml.NVMLError:  # a GPU without MIG support
        return
    for index in range(count):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except nvml.NVMLError:  # an empty slot
            continue


def _gpu(nvml: Any, handle: Any) -> Gpu:
    memory = _memory(nvml, handle)
    return Gpu(
        _text(nvml.nvmlDeviceGetName(handle)),
        _text(nvml.nvmlDeviceGetUUID(handle)),
        # On an H200, NVML's total exceeds CUDA's by 0.6 GiB (0.4%), which is exactly the driver's reserve.
        int(memory.total) - int(getattr(memory, "reserved", 0)),
        int(memory.free),
    )


def _memory(nvml: Any, handle: Any) -> Any:
    """Version 2 of the query reports the reserved memory; older drivers only have version 1."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (AttributeError, nvml.NVMLError):
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
