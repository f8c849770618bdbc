"""What earlier starts on this host taught: how far the memory estimate was off, and limits that it does not know.

The sidecar keeps both in its journal and writes them to a file; the plugin, the search and the command line read it.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from vllm_sloguard.guard import memory
from vllm_sloguard.guard.activation_memory import MEASURED, MinorVersion
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB, Budget
from vllm_sloguard.guard.model_shape import ModelShape
from vllm_sloguard.guard.repair import TUNED, Limits, Repair, repair
from vllm_sloguard.guard.rules.arguments import typed_arguments
from vllm_sloguard.guard.rules.human_sizes import as_number
from vllm_sloguard.guard.rules.rule import Estimate
from vllm_sloguard.guard.rules.single_argument import unreadable_argument
from vllm_sloguard.guard.vllm_defaults import sequences
from vllm_sloguard.knobs import KnobValues, Value

# The error of one start is trusted to a tenth less than whole, so that noise is not carried over as knowledge.
_PRIOR_WEIGHT = 0.1
# An error beyond this share of what is fixed, and this much, is another process's memory or an unknown setting.
_PLAUSIBLE_SHARE, _PLAUSIBLE_BYTES = 0.25, GIB // 2
# Seconds since the epoch, the year 5138.
_MOST_TIME = 1e11
# Arguments that change what is loaded or computed; each that differs halves a start's weight.
_SAME = ("dtype", "quantization", "tensor_parallel_size", "pipeline_parallel_size", "enforce_eager")


@dataclass(frozen=True)
class ReportedStart:
    """One start as vLLM reported it: ``kv_bytes`` is what its profiling pass left for the KV cache of one rank.

    ``args`` are those that the estimate depends on, as they ran; ``total_bytes`` is the device's memory. The other
    sizes are bytes of one rank, None where vLLM did not say.
    """

    args: KnobValues
    kind: Literal["cuda", "cpu"]
    total_bytes: Annotated[int, Field(gt=0)]
    kv_bytes: int
    kv_tokens: int | None = None
    weights_bytes: int | None = None
    activation_bytes: int | None = None
    graph_bytes: int | None = None
    vllm_version: str = ""
    source: str = ""

    @property
    def machine(self) -> Machine:
        """The machine, as far as it matters to the estimate; ``source`` has the device's name."""
        return Machine(self.kind, self.total_bytes, self.total_bytes, 1, self.source)

    def error_bytes(self, shape: ModelShape) -> int | None:
        """What vLLM took beyond the estimate; None where that says nothing about the estimate."""
        if "kv_cache_memory_bytes" in self.args:
            return None
        taken = memory.requested_bytes(self.args, self.machine) - self.kv_bytes
        fixed = memory.estimate(shape, self.args, self.machine, version=version(self.vllm_version)).fixed_bytes
        plausible = abs(taken - fixed) <= _PLAUSIBLE_SHARE * fixed + _PLAUSIBLE_BYTES
        return taken - fixed if plausible else None


class LimitKind(StrEnum):
    """What a learned rule limits; the names are those of ``repair.Limits``."""

    MAX_MODEL_LEN = "max_model_len"
    FREE_BYTES = "free_bytes"
    HEADROOM_BYTES = "headroom_bytes"


@dataclass(frozen=True)
class LearnedLimit:
    """A limit that a crash taught. ``args`` are those that crashed; times are seconds since the epoch."""

    kind: LimitKind
    value: int
    args: KnobValues
    reason: str
    learned_at: Annotated[float, Field(ge=0, lt=_MOST_TIME)]
    expires_at: Annotated[float, Field(ge=0, lt=_MOST_TIME)]
    vllm_version: str = ""


@dataclass(frozen=True)
class Learned:
    """Everything that is known of one model on one host.

    ``vllm_version`` is the one that an estimate is for; ``model`` is ``model_key`` of the model.
    """

    starts: tuple[ReportedStart, ...] = ()
    rules: tuple[LearnedLimit, ...] = ()
    vllm_version: str = ""
    model: str = ""

    def estimate(self, shape: ModelShape, args: KnobValues, machine: Machine) -> Budget:
        """``memory.estimate``, corrected by the errors of earlier starts."""
        return self.estimator(shape)(shape, args, machine)

    def estimator(self, shape: ModelShape | None) -> Estimate:
        """The same for many questions about one model: the errors are worked out once."""
        starts = [(s, error) for s in self.starts if shape is not None and (error := s.error_bytes(shape)) is not None]
        asked_for = version(self.vllm_version)

        def corrected(shape: ModelShape, args: KnobValues, machine: Machine) -> Budget:
            correction = _correction_bytes(starts, args, machine) if starts else 0
            return memory.estimate(shape, args, machine, version=asked_for, correction_bytes=correction)

        return corrected

    def repairer(
        self,
        shape: ModelShape | None,
        machine: Machine,
        now: float,
        *,
        pinned: frozenset[str],
        workload_max_len: int | None,
    ) -> Callable[[KnobValues], Repair]:
        """``repair`` with all that is known at ``now``, for many configurations of one model."""
        estimate, vllm_version = self.estimator(shape), _stated_version(self.vllm_version)

        def repaired(args: KnobValues) -> Repair:
            return repair(
                args,
                shape,
                machine,
                pinned=pinned,
                workload_max_len=workload_max_len,
                estimate=estimate,
                limits=lambda asked: self.limits(shape, asked, machine, now),
                vllm_version=vllm_version,
            )

        return repaired

    def limits(self, shape: ModelShape | None, args: KnobValues, machine: Machine, now: float) -> Limits:
        """What the rules that still hold at ``now`` say about ``args``."""
        alive = [rule for rule in self.rules if rule.expires_at > now]
        lengths = [
            r.value for r in alive if r.kind is LimitKind.MAX_MODEL_LEN and _no_more_room(r, shape, args, machine)
        ]
        free = [r.value for r in alive if r.kind is LimitKind.FREE_BYTES]
        return Limits(
            max_model_len=min(lengths, default=None),
            free_bytes=min(free, default=None),
            headroom_bytes=sum(r.value for r in alive if r.kind is LimitKind.HEADROOM_BYTES),
        )

    def of_version(self, vllm_version: str) -> "Learned":
        """What was learned from this version of vLLM, or from one that did not say."""
        known = ("", vllm_version)
        return Learned(
            tuple(start for start in self.starts if start.vllm_version in known),
            tuple(rule for rule in self.rules if rule.vllm_version in known),
            vllm_version,
            self.model,
        )

    def without(self, kind: LimitKind) -> "Learned":
        """The same but for the rules of ``kind``."""
        return replace(self, rules=tuple(rule for rule in self.rules if rule.kind is not kind))

    def of_last_version(self) -> "Learned":
        """What was learned from the version that was started last."""
        return self.of_version(self.starts[-1].vllm_version) if self.starts else self


def version(text: str) -> MinorVersion:
    """Major and minor of a version of vLLM; the one that the estimate was measured on where there is none."""
    return _stated_version(text) or MEASURED


def _stated_version(text: str) -> MinorVersion | None:
    found = re.match(r"(\d{1,9})\.(\d{1,9})", text)
    return (int(found[1]), int(found[2])) if found else None


def _correction_bytes(starts: Sequence[tuple[ReportedStart, int]], args: KnobValues, machine: Machine) -> int:
    """The weighted median of the starts' errors, each weighed by how like ``args`` it was.

    A start a doubling of the batch or of the sequences away weighs 0.6 of one that is the same, two doublings 0.14.
    """
    weighed = sorted((error, _likeness(start, args, machine)) for start, error in starts)
    total = math.fsum(weight for _, weight in weighed)
    passed, middle = 0.0, 0
    for error, weight in weighed:
        passed, middle = passed + weight, error
        if passed >= total / 2:
            break
    return int(middle * total / (total + _PRIOR_WEIGHT))


def _likeness(start: ReportedStart, args: KnobValues, machine: Machine) -> float:
    if start.kind != machine.kind:
        return 0.0
    batch = math.log2(memory.batched_tokens(args, machine) / memory.batched_tokens(start.args, start.machine))
    seqs = math.log2(max(1, sequences(args, machine)) / max(1, sequences(start.args, start.machine)))
    differing = sum(start.args.get(name) != args.get(name) for name in _SAME)
    return math.exp(-(batch**2 + seqs**2) / 2) / 2**differing


def _no_more_room(rule: LearnedLimit, shape: ModelShape | None, args: KnobValues, machine: Machine) -> bool:
    """Whether ``args`` leave no more KV tokens than those that crashed; without a model, whether they are the same."""
    if shape is None:
        tuned = {name: value for name, value in args.items() if name in TUNED}
        return {**rule.args, "max_model_len": None} == {**tuned, "max_model_len": None}
    try:
        room, had = (memory.estimate(shape, a, machine).kv_tokens for a in (args, rule.args))
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        # Values that vLLM can't read, or out of range: the repair says so before it looks at lengths.
        return False
    return room <= had


START: TypeAdapter[ReportedStart] = TypeAdapter(ReportedStart)
RULE: TypeAdapter[LearnedLimit] = TypeAdapter(LearnedLimit)
_LEARNED: TypeAdapter[Learned] = TypeAdapter(Learned)


def to_json(learned: Learned) -> str:
    """As the file holds it."""
    return _LEARNED.dump_json(learned).decode()


def read_history(path: Path, model: str) -> Learned:
    """What ``path`` holds of ``model``; nothing where there is no such file, or it is of another model.

    Raises:
        ValueError: it can't be read or is damaged.
    """
    try:
        found = _LEARNED.validate_json(path.read_bytes())
    except FileNotFoundError:
        return Learned()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"{path}: damaged: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    return found if found.model == model_key(model) else Learned()


def model_key(model: str) -> str:
    """Names a model; a local one by what its config.json holds too."""
    try:
        content = (Path(model) / "config.json").read_bytes()
    except OSError:
        return model
    return f"{Path(model).resolve()} {hashlib.sha256(content).hexdigest()[:16]}"


def known_args(args: Mapping[str, object]) -> dict[str, Value] | None:
    """Those of an engine's arguments that the estimate or a rule depends on, as vLLM reads them.

    None where one of them can't be read: then nothing is known of the start.
    """
    scalars = {name: value for name in TUNED if isinstance(value := args.get(name), bool | int | float | str)}
    given = {name: as_number(name, value) for name, value in scalars.items()}
    return None if unreadable_argument(given) else dict(typed_arguments(given))


def ranks_of(args: Mapping[str, object]) -> int:
    """GPUs that an engine takes: tensor times pipeline parallel."""
    sizes = (args.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size"))
    ranks = 1
    for size in sizes:
        ranks *= size if isinstance(size, int) and size > 0 else 1
    return ranks
