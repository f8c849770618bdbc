"""Rules, and the cases that they check."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import TypeAlias

from vllm_sloguard.guard import memory
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import Budget
from vllm_sloguard.guard.model_shape import ModelShape
from vllm_sloguard.guard.rules import arguments
from vllm_sloguard.knobs import KnobValues, Value

Version: TypeAlias = tuple[int, ...]
# An argument and the value that would fix a broken rule; None is vLLM's default.
Way: TypeAlias = tuple[str, Value | None]
# The memory arithmetic of a model's shape, arguments as vLLM reads them, and a machine.
Estimate: TypeAlias = Callable[[ModelShape, KnobValues, Machine], Budget | None]


class Stage(StrEnum):
    """The stage at which vLLM fails."""

    CONFIG = "config"  # EngineArgs.create_engine_config raises
    START = "start"  # the engine fails later during its start: kernels, number formats
    MEMORY = "memory"  # the engine runs out of memory, according to the budget
    LEARNED = "learned"  # it failed on this host before


@dataclass(frozen=True)
class Versions:
    """The vLLM versions (inclusive) in which a rule was seen to apply; None is no limit."""

    since: Version = (0, 26)
    until: Version | None = None

    def hold(self, version: Version | None) -> bool:
        """Whether the rule applies to ``version``; every rule applies to an unknown one."""
        if version is None:
            return True
        return version >= self.since and (self.until is None or version[: len(self.until)] <= self.until)


@dataclass(frozen=True)
class Limits:
    """Limits learned from starts and crashes of one model on one host; by default none.

    ``max_model_len`` is the longest length (tokens) that vLLM reported to fit, ``free_bytes`` the least memory found
    free at a start, ``headroom_bytes`` the memory kept free since an out-of-memory under load.
    """

    max_model_len: int | None = None
    free_bytes: int | None = None
    headroom_bytes: int = 0


@dataclass(frozen=True)
class Case:
    """A configuration as given (``args``), and what it is to run on and for.

    ``workload_max_len`` is 0 where unknown; ``pinned`` arguments are not to be changed.
    """

    args: KnobValues
    shape: ModelShape | None
    machine: Machine | None
    pinned: frozenset[str] = frozenset()
    workload_max_len: int = 0
    taught: Callable[[KnobValues], Limits] = field(default=lambda _: Limits())
    version: Version | None = None
    estimate: Estimate = memory.estimate

    @cached_property
    def values(self) -> Mapping[str, Value]:
        """The arguments as vLLM parses them. All must be readable, which the first rule ensures."""
        return arguments.typed_arguments(self.args)

    @cached_property
    def limits(self) -> Limits:
        """The learned limits that apply to these arguments."""
        return self.taught(self.values)

    def number(self, name: str) -> int | None:
        """An integer argument as vLLM parses it; None if absent."""
        value = self.values.get(name)
        return None if value is None else int(value)

    @property
    def length(self) -> int | None:
        """The length that vLLM's scheduler checks against; -1 means the model's maximum there."""
        stated = self.number("max_model_len")
        if stated is not None and stated > 0:
            return stated
        return self.shape.max_model_len if self.shape else None

    @property
    def chunked(self) -> bool:
        """Whether prompts may be split over steps; vLLM's default for decoders."""
        return self.values.get("enable_chunked_prefill") is not False

    @cached_property
    def budget(self) -> Budget | None:
        """The memory of this configuration; None without a model's shape or a machine."""
        return self.estimate(self.shape, self.values, self.machine) if self.shape and self.machine else None

    @property
    def dependable_budget(self) -> Budget | None:
        """The budget, if a configuration may be changed for it."""
        return self.budget if self.budget is not None and self.budget.dependable else None

    def but(self, name: str, value: Value | None) -> "Case":
        """A copy with one argument changed; None removes it."""
        rest = {key: old for key, old in self.args.items() if key != name}
        args = rest if value is None else {**rest, name: value}
        return replace(self, args=args)


@dataclass(frozen=True)
class Broken:
    """Why a rule is broken, in numbers, and possible fixes, least harmful first; without any, it cannot be fixed."""

    reason: str
    ways: tuple[Way, ...] = ()


@dataclass(frozen=True)
class Rule:
    """One requirement of vLLM: its wording, the versions it applies to, the stage that fails, and its check."""

    name: str
    demand: str
    stage: Stage
    check: Callable[[Case], Broken | None]
    versions: Versions = Versions()
