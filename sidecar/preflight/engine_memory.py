"""The running engines of this state folder, and the memory that they use, which a window frees."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sidecar.config.schema import Config
from sidecar.record.journal import Journal
from vllm_sloguard.agent.held_memory import held_bytes
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.guard import machine
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.start_history import ranks_of


@dataclass(frozen=True)
class Own:
    """The process ids of running engines."""

    pids: frozenset[int] = frozenset()


def running(journal: Journal | None) -> Own:
    """The processes of every running engine in ``journal``. Raises JournalError."""
    pids: set[int] = set()
    for record in journal.engines() if journal is not None else ():
        # An agent's engine is found by its mark, if it is on this machine.
        identity = replace(record.identity, pid=-1) if record.identity.remote else record.identity
        group = ProcessGroup(identity)
        if record.identity.remote or group.leader_alive():
            pids |= {member.pid for member in group.members()}
    return Own(frozenset(pids))


def machine_without(own: Own, config: Config, args: Mapping[str, object]) -> tuple[Machine, int]:
    """The machine as a trial with ``args`` would see it, and the current memory of ``own`` in bytes. Raises OSError."""
    environment = {**os.environ, **config.engine.env}
    here = machine.observe(environment, ranks=ranks_of(args))
    held = held_bytes(own.pids, here, environment)
    return replace(here, free_bytes=min(here.total_bytes, here.free_bytes + held)), held
