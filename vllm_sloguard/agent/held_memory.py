"""The memory that running engines use, which is free once they have ended."""

from collections.abc import Collection, Mapping
from contextlib import suppress

import psutil

from vllm_sloguard.guard import gpus
from vllm_sloguard.guard.machine import Machine


def held_bytes(pids: Collection[int], machine: Machine, environment: Mapping[str, str]) -> int:
    """What ``pids`` use of the memory that ``machine`` describes, for engines with ``environment``."""
    if machine.kind == "cuda":
        return _held_on_gpus(pids, environment.get("CUDA_VISIBLE_DEVICES"))
    return _rss(pids)


def _held_on_gpus(pids: Collection[int], setting: str | None) -> int:
    """The smallest amount that they use on any of their devices."""
    used: dict[str, int] = {}
    for tenant in gpus.tenants(gpus.visible(setting)) or ():
        if tenant.pid in pids:
            used[tenant.uuid] = used.get(tenant.uuid, 0) + (tenant.used_bytes or 0)
    return min(used.values(), default=0)


def _rss(pids: Collection[int]) -> int:
    """Their unshared memory: memory shared with other processes or files is not freed when one ends."""
    total = 0
    for pid in pids:
        with suppress(psutil.Error):
            memory = psutil.Process(pid).memory_info()
            total += max(memory.rss - memory.shared, 0)
    return total
