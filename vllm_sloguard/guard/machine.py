"""The memory of the machine that an engine would run on: from NVML for GPUs, else as vLLM's CPU backend counts it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_sloguard.guard import gpus

# An engine's own CUDA context, allocated before vLLM checks free memory: 0.52 GiB in every start on an H200.
_CONTEXT_BYTES = int(0.52 * 2**30)
# cgroup v1 expresses "no limit" as a number near 2**63.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Machine:
    """``total_bytes`` and ``free_bytes`` are one device's: the smallest of the GPUs in use, or the memory node.

    ``gpus`` counts the visible ones.
    """

    kind: Literal["cuda", "cpu"]
    total_bytes: int
    free_bytes: int
    gpus: int
    source: str


def observe(
    environ: Mapping[str, str] = os.environ,
    *,
    ranks: int = 1,
    sys_root: Path = Path("/sys"),
    proc_root: Path = Path("/proc"),
) -> Machine:
    """This machine as seen by an engine of ``ranks`` processes started now.

    vLLM uses the first ``ranks`` visible GPUs, and sizes its cache by the rank with the least memory. Free memory is
    what remains after its own CUDA context.

    Raises:
        OSError: there is no GPU, and the kernel's memory files cannot be read.
    """
    found = gpus.visible(environ.get("CUDA_VISIBLE_DEVICES"))
    if not found:
        return _cpu(sys_root, proc_root)
    used = found[: max(1, ranks)]
    return Machine(
        kind="cuda",
        total_bytes=min(gpu.total_bytes for gpu in used),
        free_bytes=max(0, min(gpu.free_bytes for gpu in used) - _CONTEXT_BYTES),
        gpus=len(found),
        source=f"NVML: {found[0].name}",
    )


def _cpu(sys_root: Path, proc_root: Path) -> Machine:
    """Like ``get_memory_node_info`` of vllm/utils/cpu_resource_utils.py (0.32), for the first allowed NUMA node.

    Reclaimable memory counts as free. A cgroup limit below the node's total replaces it; then everything that the
    cgroup uses, including page cache, counts as used.
    """
    node = _first_allowed_node(proc_root)
    path = sys_root / f"devices/system/node/node{node}/meminfo"
    if path.exists():
        info = _meminfo(path)
        total = info["MemTotal"]
        free = sum(info[key] for key in ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable"))
    else:
        path = proc_root / "meminfo"
        info = _meminfo(path)
        total, free = info["MemTotal"], info["MemAvailable"]
    limit, used = _cgroup(sys_root / "fs/cgroup")
    if limit is not None and limit < total:
        return Machine("cpu", limit, max(0, min(free, limit - used)), 0, "cgroup limit")
    return Machine("cpu", total, free, 0, str(path))


def _meminfo(path: Path) -> dict[str, int]:
    """Bytes by name. A node's lines start with "Node 0", the system's do not."""
    found: dict[str, int] = {}
    for line in path.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            found[name.split()[-1]] = int(words[0]) * 1024
    missing = {"MemTotal", "MemFree"} - found.keys()
    if missing:
        raise OSError(f"{path}: {', '.join(sorted(missing))} is missing")
    return {"Active(file)": 0, "Inactive(file)": 0, "SReclaimable": 0, "MemAvailable": found["MemFree"], **found}


def _first_allowed_node(proc_root: Path) -> int:
    status = proc_root / "self/status"
    if not status.exists():
        return 0
    for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, rest = line.partition(":")
        first = rest.strip().split(",")[0].split("-")[0]
        if name == "Mems_allowed_list" and first.isdecimal():
            return int(first)
    return 0


def _cgroup(root: Path) -> tuple[int | None, int]:
    """Limit and usage in bytes, v2 before v1; (None, 0) if there is no limit."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit = _number(root / limit_name)
        if limit is not None and limit < _NO_LIMIT:
            return limit, _number(root / used_name) or 0
    return None, 0


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
