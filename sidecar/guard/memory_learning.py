"""Learns from every engine start: the memory that vLLM reports, and limits stated in crash messages.

Both are stored in the journal per host and model, and exported to a file that the plugin reads.
"""

import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sidecar.observe.telemetry import EngineTelemetry
from sidecar.record.atomic_write import write_whole
from sidecar.record.journal import Journal
from vllm_sloguard.crash import Category, Crash
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB
from vllm_sloguard.guard.start_history import (
    Learned,
    LearnedLimit,
    LimitKind,
    ReportedStart,
    known_args,
    model_key,
    ranks_of,
    to_json,
)

LEARNED_FILE = "learned.json"

_LONGEST_LENGTH = re.compile(r"estimated maximum model length is (\d+)")
_FREE_ON_DEVICE = re.compile(r"Free memory on device \S+ \(([0-9.]+)/[0-9.]+ GiB\) on startup is less than")
_ALLOCATION = re.compile(r"CUDA out of memory|CUDA error: out of memory|\bOutOfMemoryError\b|cudaErrorMemoryAllocation")
# How long a limit holds: the longest length only changes with vLLM; other tenants of the GPU come and go.
_LENGTH_HOLDS_S, _TENANT_HOLDS_S, _HEADROOM_HOLDS_S = 30 * 86400.0, 900.0, 7 * 86400.0
# Headroom added after each out-of-memory under load, and its upper bound.
_HEADROOM_SHARE, _HEADROOM_BYTES, _MAX_HEADROOM_SHARE = 0.02, GIB, 0.1


class Learning:
    """Reads and records what was learned about one model on this host."""

    def __init__(self, journal: Journal, folder: Path, model: str, observe: Callable[[int], Machine]) -> None:
        self.journal = journal
        self.path = folder / LEARNED_FILE
        self._host = platform.node()
        self._model = model_key(model)
        self._observe = observe

    def current(self) -> Learned:
        """What was learned from the latest vLLM version, without expired rules. Raises JournalError."""
        starts = self.journal.starts(self._host, self._model)
        rules = self.journal.rules(time.time(), self._host, self._model)
        return Learned(starts, rules, model=self._model).of_last_version()

    def started(self, args: Mapping[str, object], telemetry: EngineTelemetry) -> None:
        """Records the memory reported by a start with ``args``. Raises JournalError, OSError."""
        known = known_args(args)
        start = None if known is None else start_of(known, self._observe(ranks_of(known)), telemetry)
        if start is not None:
            self.journal.record_start(self._host, self._model, start)
            self._write()

    def crashed(self, args: Mapping[str, object], telemetry: EngineTelemetry, crash: Crash) -> None:
        """Records the limit learned from the crash of an engine with ``args``. Raises JournalError, OSError."""
        known = known_args(args)
        if known is None:
            return
        version = telemetry.memory.vllm_version if telemetry.memory is not None else ""
        rule = rule_of(crash, known, self._observe(ranks_of(known)), self.current(), version, time.time())
        if rule is not None:
            self.journal.record_rule(self._host, self._model, rule)
            self._write()

    def _write(self) -> None:
        write_whole(self.path, to_json(self.current()))


def start_of(
    args: Mapping[str, bool | int | float | str], machine: Machine, telemetry: EngineTelemetry
) -> ReportedStart | None:
    """The start as reported by the plugin; None if it ended before vLLM had profiled its memory."""
    profile = telemetry.memory
    if profile is None:
        return None
    return ReportedStart(
        args=args,
        kind=machine.kind,
        total_bytes=profile.total_bytes or machine.total_bytes,
        kv_bytes=profile.kv_cache_bytes,
        kv_tokens=telemetry.kv_cache_tokens,
        weights_bytes=profile.weights_bytes if profile.HasField("weights_bytes") else None,
        activation_bytes=profile.activation_bytes if profile.HasField("activation_bytes") else None,
        graph_bytes=profile.graph_bytes if profile.HasField("graph_bytes") else None,
        vllm_version=profile.vllm_version,
        source=machine.source,
    )


def rule_of(  # noqa: PLR0917 - the parts of a rule
    crash: Crash,
    args: Mapping[str, bool | int | float | str],
    machine: Machine,
    known: Learned,
    vllm_version: str,
    now: float,
) -> LearnedLimit | None:
    """The limit to learn from ``crash``, if any."""
    if crash.category is not Category.OUT_OF_MEMORY:
        return None
    if length := _LONGEST_LENGTH.search(crash.evidence):
        return LearnedLimit(
            LimitKind.MAX_MODEL_LEN,
            int(length[1]),
            args,
            f"vLLM reported room for requests of at most {length[1]} tokens",
            now,
            now + _LENGTH_HOLDS_S,
            vllm_version,
        )
    if free := _FREE_ON_DEVICE.search(crash.evidence):
        reason = f"only {free[1]} GiB were free when vLLM started"
        return LearnedLimit(LimitKind.FREE_BYTES, int(float(free[1]) * GIB), args, reason, now, now + _TENANT_HOLDS_S)
    if not _ALLOCATION.search(crash.evidence):
        return None
    kept = sum(rule.value for rule in known.rules if rule.kind is LimitKind.HEADROOM_BYTES)
    step = min(
        max(int(machine.total_bytes * _HEADROOM_SHARE), _HEADROOM_BYTES),
        int(machine.total_bytes * _MAX_HEADROOM_SHARE) - kept,
    )
    if step < _HEADROOM_BYTES // 2:  # the upper bound is reached
        return None
    reason = f"out of memory while {crash.phase}: {step / GIB:.2f} GiB more are kept free"
    return LearnedLimit(LimitKind.HEADROOM_BYTES, step, args, reason, now, now + _HEADROOM_HOLDS_S, vllm_version)
