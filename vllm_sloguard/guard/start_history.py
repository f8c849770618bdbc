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
from vllm_sloguard.guard.evidence import ModelEvidence
from vllm_sloguard.guard.known_model import KnownModel
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
# A start says nothing of another one that differs in any of these: a start with online fp8 once made the estimate for
# bf16 worse by 7.9%. Each has the value that stands for vLLM's default.
_SAME_MODEL: Mapping[str, Value | None] = {
    "dtype": "auto",
    "quantization": None,
    "kv_cache_dtype": "auto",
    "enforce_eager": False,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
}


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

    def error_bytes(self, known: KnownModel) -> int | None:
        """What vLLM took beyond the estimate; None where that says nothing about the estimate."""
        shape = known.shape_with(self.args)
        if shape is None or "kv_cache_memory_bytes" in self.args:
            return None
        evidence = self.evidence(known)
        taken = memory.requested_bytes(self.args, self.machine) - self.kv_bytes
        budget = memory.estimate(shape, self.args, self.machine, version=version(self.vllm_version), evidence=evidence)
        plausible = abs(taken - budget.fixed_bytes) <= _PLAUSIBLE_SHARE * budget.fixed_bytes + _PLAUSIBLE_BYTES
        return taken - budget.fixed_bytes if plausible else None

    def evidence(self, known: KnownModel) -> ModelEvidence:
        """What is known of the model as it was started, with the weights that vLLM reported."""
        found = known.evidence(self.args, self.machine)
        return replace(found, reported_weights_bytes=self.weights_bytes)


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
        budget = self.estimator(KnownModel(shape))(shape, args, machine)
        assert budget is not None
        return budget

    def estimator(self, known: KnownModel) -> Estimate:
        """The best estimate that there is, for many questions about one model: errors are worked out once.

        It answers None where arguments change the model, and vLLM was not asked.
        """
        starts = [(start, error) for start in self.starts if (error := start.error_bytes(known)) is not None]
        asked_for = version(self.vllm_version)

        def corrected(shape: ModelShape, args: KnobValues, machine: Machine) -> Budget | None:
            if known.unknown(args):
                return None
            evidence = known.evidence(args, machine)
            like = [(s, error) for s, error in starts if _same_model(s, args, machine, self.vllm_version)]
            if like:
                reported = [s.weights_bytes for s, _ in like if s.weights_bytes is not None]
                evidence = replace(evidence, reported=True, reported_weights_bytes=reported[-1] if reported else None)
            correction = _correction_bytes(like, args, machine) if like else 0
            return memory.estimate(
                shape, args, machine, version=asked_for, correction_bytes=correction, evidence=evidence
            )

        return corrected

    def repairer(
        self,
        known: KnownModel,
        machine: Machine,
        now: float,
        *,
        pinned: frozenset[str],
        workload_max_len: int | None,
    ) -> Callable[[KnobValues], Repair]:
        """``repair`` with all that is known at ``now``, for many configurations of one model."""
        estimate, vllm_version = self.estimator(known), _stated_version(self.vllm_version)

        def repaired(args: KnobValues) -> Repair:
            shape = known.shape_with(args)
            return repair(
                args,
                shape,
                machine,
                pinned=pinned,
                workload_max_len=workload_max_len,
                estimate=estimate,
                limits=lambda asked: self.limits(shape, asked, machine, now),
                vllm_version=vllm_version,
                unknown=known.problem,
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
    if not total:
        return 0
    passed, middle = 0.0, 0
    for error, weight in weighed:
        passed, middle = passed + weight, error
        if passed >= total / 2:
            break
    return int(middle * total / (total + _PRIOR_WEIGHT))


def _same_model(start: ReportedStart, args: KnobValues, machine: Machine, vllm_version: str) -> bool:
    """Whether a start says something of ``args``: the same weights, types and layout, on the same version of vLLM."""
    if start.kind != machine.kind or not _same_version(start.vllm_version, vllm_version):
        return False
    return all(
        (start.args.get(name) or default) == (args.get(name) or default) for name, default in _SAME_MODEL.items()
    )


def _same_version(one: str, other: str) -> bool:
    return not one or not other or version(one) == version(other)


def _likeness(start: ReportedStart, args: KnobValues, machine: Machine) -> float:
    batch = math.log2(memory.batched_tokens(args, machine) / memory.batched_tokens(start.args, start.machine))
    seqs = math.log2(max(1, sequences(args, machine)) / max(1, sequences(start.args, start.machine)))
    return math.exp(-(batch**2 + seqs**2) / 2)


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
