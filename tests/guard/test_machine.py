"""The memory that vLLM would see, from files laid out like the kernel's."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_sloguard.machine import Machine, observe, visible

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


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, (0, 1, 2)),
        ("", ()),
        ("1", (1,)),
        ("2, 0", (2, 0)),
        ("1,9,0", (1,)),
        ("-1", ()),
        ("GPU-8932f937", (0, 1, 2)),
    ],
)
def test_visible_gpus(setting: str | None, expected: tuple[int, ...]) -> None:
    assert visible(setting, 3) == expected


def test_smallest_visible_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = [
        SimpleNamespace(total=100, free=50),
        SimpleNamespace(total=80, free=70),
        SimpleNamespace(total=10, free=1),
    ]
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,  # pyright: ignore[reportUnknownLambdaType]
        nvmlDeviceGetMemoryInfo=memory.__getitem__,
        nvmlDeviceGetName=lambda _: "NVIDIA H200",  # pyright: ignore[reportUnknownLambdaType]
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert observe() == Machine("cuda", 80, 50, 2, "NVML: NVIDIA H200")
