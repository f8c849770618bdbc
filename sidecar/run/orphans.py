"""Engines that an earlier sidecar left running: which are ended, and which are left alone.

The journal may be an older copy, and the state folder a copy of one that is in use. So an engine is ended only if it
writes to this folder's logs, and never if it is missing from the journal and was started to serve.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from sidecar.record.journal import Journal, JournalError
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.agent.process_identity import Identity, command_words, engines_writing_to, leader_of, output_of

_ENGINE_ID = re.compile(r"[0-9a-f]{12}")


class Orphans:
    """The engines of one state folder that the current sidecar did not start."""

    def __init__(self, journal: Journal, logs: Path, say: Callable[[str], None]) -> None:
        self._journal = journal
        self._logs = logs
        self._say = say

    def unrecorded(self) -> dict[str, Identity]:
        """Leaders of running engines that have no row in the journal: the disk was full, or the journal is a copy."""
        recorded = {record.identity.engine_id for record in self._journal.engines()}
        found: dict[str, Identity] = {}
        for engine_id in engines_writing_to(self._logs) - recorded:
            if _ENGINE_ID.fullmatch(engine_id):
                found[engine_id] = leader_of(engine_id) or Identity(-1, 0.0, engine_id)
        return found

    def end(self, keep: str = "") -> list[str]:
        """Kills the engines that may be ended, except ``keep``; returns their ids."""
        ended: list[str] = []
        for record in self._journal.engines():
            identity = record.identity
            if identity.engine_id == keep:
                continue
            # The process may have started before its pid was recorded: find it by its environment.
            group = ProcessGroup(replace(identity, pid=identity.pid or -1))
            members = group.members()
            if members and not any(self._writes_here(member) for member in members):
                self._say(f"an engine of another state folder (process {members[0].pid}) is left running")
                continue
            group.kill()
            with suppress(JournalError):  # the next start of the sidecar notices that it is gone
                self._journal.engine_gone(identity.engine_id)
            ended.append(identity.engine_id)
        for engine_id, leader in self.unrecorded().items():
            if engine_id in {keep, *ended}:
                continue
            if started_to_serve(leader.pid):
                self._say(f"a serving engine that is not in the journal (process {leader.pid}) is left running")
                continue
            ProcessGroup(replace(leader, pid=-1)).kill()
            ended.append(engine_id)
        return ended

    def _writes_here(self, member: psutil.Process) -> bool:
        try:
            return output_of(member.pid).parent == self._logs.resolve()
        except OSError:
            return False


def option_value(words: list[str], name: str) -> str:
    """The value of a command-line option; empty without it."""
    return words[words.index(name) + 1] if name in words[:-1] else ""


def started_to_serve(pid: int) -> bool:
    """Whether an engine was started to serve: only those are drained, so only they have a shutdown timeout."""
    return option_value(command_words(pid), "--shutdown-timeout") not in ("", "0")
