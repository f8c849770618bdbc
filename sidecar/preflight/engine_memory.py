"""The running engines of this state folder, and the memory that they use, which a window frees."""

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace

import psutil

from sidecar.config.schema import Config
from sidecar.record.journal import Journal
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.guard import gpus, machine
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.start_history import ranks_of


@dataclass(frozen=True)
class Own:
    """The process ids of running engines."""

    pids: frozenset[int] = frozenset()


def running(journal: Journal | None) -> Own:
    """The processes of every running engine in ``journal``. Raises JournalError."""
    groups = [ProcessGroup(record.identity) for record in journal.engines()] if journal is not None else []
    return Own(frozenset(p.pid for group in groups if group.leader_alive() for p in group.members()))


def machine_without(own: Own, config: Config, args: dict[str, object]) -> tuple[Machine, int]:
    """The machine as a trial with ``args`` would see it, and the current memory of ``own`` in bytes. Raises OSError."""
    environment = {**os.environ, **config.engine.env}
    here = machine.observe(environment, ranks=ranks_of(args))
    held = _held_on_gpus(own.pids, environment.get("CUDA_VISIBLE_DEVICES")) if here.kind == "cuda" else _rss(own.pids)
    return replace(here, free_bytes=min(here.total_bytes, here.free_bytes + held)), held


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
