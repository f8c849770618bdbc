"""The memory that vLLM would see, read from files like the kernel's."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from vllm_sloguard.guard.gpus import Gpu, Tenant, selected, tenants
from vllm_sloguard.guard.machine import observe
from vllm_sloguard.guard.memory import GIB

SOURCE = "NVML: NVIDIA H200"

KIB = 1024


def lay_out(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root / "sys", root / "proc"


def node(number: int, free: int) -> str:
    values = {"MemTotal": 1000, "MemFree": free, "Active(file)": 10, "Inactive(file)": 20, "SReclaimable": 5}
    return "".join(f"Node {number} {name}: {value} kB\n" for name, value in values.items())


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_numa_node_counts_what_can_be_reclaimed(tmp_path: Path) -> None:
    files = {
        "sys/devices/system/node/node0/meminfo": node(0, 100),
        "sys/devices/system/node/node1/meminfo": node(1, 200),
        "proc/self/status": "Name: x\nMems_allowed_list:\t1-3\n",
    }
    sys_root, proc_root = lay_out(tmp_path, files)
    machine = observe(sys_root=sys_root, proc_root=proc_root)
    assert (machine.kind, machine.total_bytes, machine.free_bytes, machine.gpus) == ("cpu", 1000 * KIB, 235 * KIB, 0)


@pytest.mark.parametrize(
    ("limit", "used", "total", "free"),
    [
        ("max", "0", 1000 * KIB, 135 * KIB),
        (str(2000 * KIB), "0", 1000 * KIB, 135 * KIB),
        (str(500 * KIB), str(400 * KIB), 500 * KIB, 100 * KIB),
        (str(500 * KIB), str(600 * KIB), 500 * KIB, 0),
        (str(500 * KIB), "", 500 * KIB, 135 * KIB),
    ],
)
def test_cgroup_limits(tmp_path: Path, limit: str, used: str, total: int, free: int) -> None:
    files = {
        "sys/devices/system/node/node0/meminfo": node(0, 100),
        "sys/fs/cgroup/memory.max": limit,
        "sys/fs/cgroup/memory.current": used,
    }
    sys_root, proc_root = lay_out(tmp_path, files)
    machine = observe(sys_root=sys_root, proc_root=proc_root)
    assert (machine.total_bytes, machine.free_bytes) == (total, free)


def test_without_numa_the_system_counts(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 700 kB\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
    }
    sys_root, proc_root = lay_out(tmp_path, files)
    machine = observe(sys_root=sys_root, proc_root=proc_root)
    assert (machine.total_bytes, machine.free_bytes) == (1000 * KIB, 700 * KIB)


def test_unreadable_memory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="meminfo"):
        observe(sys_root=tmp_path, proc_root=tmp_path)


def gpu(uuid: str, free: int = 1) -> Gpu:
    return Gpu("NVIDIA H200", uuid, 100, free)


WHOLE = tuple((gpu(uuid),) for uuid in ("GPU-aa1", "GPU-bb2", "GPU-cc3"))
SLICED = ((gpu("GPU-aa1"),), (gpu("MIG-d1"), gpu("MIG-d2")))


@pytest.mark.parametrize(
    ("devices", "setting", "expected"),
    [
        (WHOLE, None, ["GPU-aa1", "GPU-bb2", "GPU-cc3"]),
        (WHOLE, "", []),
        (WHOLE, "1", ["GPU-bb2"]),
        (WHOLE, "2, 0", ["GPU-cc3", "GPU-aa1"]),
        (WHOLE, "1,9,0", ["GPU-bb2"]),
        (WHOLE, "-1", []),
        (WHOLE, "1,1", ["GPU-bb2"]),
        (WHOLE, "GPU-bb", ["GPU-bb2"]),
        (WHOLE, "GPU-bb2,GPU-xx,0", ["GPU-bb2"]),
        (SLICED, None, ["GPU-aa1", "MIG-d1"]),
        (SLICED, "1", ["MIG-d1"]),
        (SLICED, "MIG-d2", ["MIG-d2"]),
    ],
)
def test_what_cuda_shows(devices: tuple[tuple[Gpu, ...], ...], setting: str | None, expected: list[str]) -> None:
    assert [found.uuid for found in selected(devices, setting)] == expected


class Nvml:
    """NVML's answers for two whole GPUs, and one in MIG mode with a slice in its second slot."""

    NVMLError = RuntimeError
    nvmlMemory_v2 = 2  # noqa: N815
    # GiB: total, free, reserved.
    memory: ClassVar = {0: (103, 50, 3), 1: (80, 70, 0), 2: (140, 140, 0), "slice": (10, 1, 0)}

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlShutdown(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, _: object) -> bytes:  # noqa: N802
        return b"NVIDIA H200"

    def nvmlDeviceGetUUID(self, handle: object) -> str:  # noqa: N802
        return f"MIG-{handle}" if handle == "slice" else f"GPU-{handle}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid == "GPU-1":
            raise RuntimeError("not found")
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        used = {"GPU-0": 2 * GIB, "MIG-slice": None}
        return [SimpleNamespace(pid=7, usedGpuMemory=used[handle])]

    def nvmlDeviceGetMemoryInfo(self, handle: int | str, version: int = 1) -> SimpleNamespace:  # noqa: N802
        total, free, reserved = (size * GIB for size in self.memory[handle])
        if version == 1:
            return SimpleNamespace(total=total, free=free)
        if handle == 1:
            raise RuntimeError("not supported")
        return SimpleNamespace(total=total, free=free, reserved=reserved)

    def nvmlDeviceGetMigMode(self, handle: int) -> tuple[int, int]:  # noqa: N802
        if handle == 0:
            raise RuntimeError("not supported")
        return (1, 1) if handle == 2 else (0, 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, _: int) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, _: int, index: int) -> str:  # noqa: N802
        if index != 1:
            raise RuntimeError("not found")
        return "slice"


@pytest.mark.parametrize(
    ("setting", "ranks", "expected"),
    [
        (None, 1, (100, 50, 3)),
        (None, 2, (80, 50, 3)),
        (None, 3, (10, 1, 3)),
        ("1", 1, (80, 70, 1)),
        ("MIG-slice", 1, (10, 1, 1)),
    ],
)
def test_the_smallest_gpu_in_use_counts(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, ranks: int, expected: tuple[int, int, int]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    environ = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
    seen = observe(environ, ranks=ranks)
    assert (seen.kind, seen.total_bytes / GIB, seen.gpus, seen.source) == ("cuda", expected[0], expected[2], SOURCE)
    # The engine's own CUDA context is not there yet.
    assert seen.free_bytes / GIB == pytest.approx(expected[1] - 0.52)


def test_who_is_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    assert tenants([gpu("GPU-0"), gpu("MIG-slice")]) == (Tenant("GPU-0", 7, 2 * GIB), Tenant("MIG-slice", 7, None))
    assert tenants([gpu("GPU-1")]) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert tenants([gpu("GPU-0")]) is None
