"""What earlier starts on this host taught: the error of the memory estimate, and limits learned from crashes.

The sidecar keeps both in its journal and exports them to a file for the plugin, the search and the command line.
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
from vllm_sloguard.guard.bounded_read import read_small_file
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

# Weight of "no error", in starts: shrinks the correction, so that a single noisy start is not taken at face value.
_PRIOR_WEIGHT = 0.1
# A larger error than this (share of the fixed memory, plus a constant) is due to another process or an unknown setting.
_PLAUSIBLE_SHARE, _PLAUSIBLE_BYTES = 0.25, GIB // 2
# Latest accepted timestamp: the year 5138.
_MAX_TIME = 1e11
# Starts that differ in any of these are not comparable: a start with online fp8 once made the estimate for bf16 worse
# by 7.9%. The values are vLLM's defaults.
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
    """One start as reported by vLLM: ``kv_bytes`` is what its profile run left for the KV cache, per rank.

    ``args`` are the effective arguments that the estimate depends on; ``total_bytes`` is the device's memory. Other
    sizes are per rank, None if not reported.
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
        """The machine, as far as the estimate depends on it; ``source`` is the device's name."""
        return Machine(self.kind, self.total_bytes, self.total_bytes, 1, self.source)

    def error_bytes(self, known: KnownModel) -> int | None:
        """Actual minus estimated memory use; None if the two are not comparable."""
        shape = known.shape_with(self.args)
        if shape is None or "kv_cache_memory_bytes" in self.args:
            return None
        evidence = self.evidence(known)
        taken = memory.requested_bytes(self.args, self.machine) - self.kv_bytes
        budget = memory.estimate(shape, self.args, self.machine, version=version(self.vllm_version), evidence=evidence)
        plausible = abs(taken - budget.fixed_bytes) <= _PLAUSIBLE_SHARE * budget.fixed_bytes + _PLAUSIBLE_BYTES
        return taken - budget.fixed_bytes if plausible else None

    def evidence(self, known: KnownModel) -> ModelEvidence:
        """The evidence for the model as started, with the weights that vLLM reported."""
        found = known.evidence(self.args, self.machine)
        return replace(found, reported_weights_bytes=self.weights_bytes)


class LimitKind(StrEnum):
    """What a learned rule limits; named after the fields of ``repair.Limits``."""

    MAX_MODEL_LEN = "max_model_len"
    FREE_BYTES = "free_bytes"
    HEADROOM_BYTES = "headroom_bytes"


@dataclass(frozen=True)
class LearnedLimit:
    """A limit learned from a crash with ``args``. Times are in seconds since the epoch."""

    kind: LimitKind
    value: int
    args: KnobValues
    reason: str
    learned_at: Annotated[float, Field(ge=0, lt=_MAX_TIME)]
    expires_at: Annotated[float, Field(ge=0, lt=_MAX_TIME)]
    vllm_version: str = ""


@dataclass(frozen=True)
class Learned:
    """Everything learned about one model on one host.

    ``vllm_version`` is the version that estimates are made for; ``model`` is the model's ``model_key``.
    """

    starts: tuple[ReportedStart, ...] = ()
    rules: tuple[LearnedLimit, ...] = ()
    vllm_version: str = ""
    model: str = ""

    def estimate(self, shape: ModelShape, args: KnobValues, machine: Machine) -> Budget:
        """``memory.estimate``, corrected by the errors seen in earlier starts."""
        budget = self.estimator(KnownModel(shape))(shape, args, machine)
        assert budget is not None
        return budget

    def estimator(self, known: KnownModel) -> Estimate:
        """A function that estimates configurations of one model; the errors of earlier starts are computed only once.

        It returns None if the arguments change the model itself and vLLM has not been asked about the result.
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
        """``repair`` with everything known at ``now``, for many configurations of one model."""
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
        """The limits for ``args`` from rules that have not expired at ``now``."""
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
        """Only what was learned from this version of vLLM, or from an unknown one."""
        known = ("", vllm_version)
        return Learned(
            tuple(start for start in self.starts if start.vllm_version in known),
            tuple(rule for rule in self.rules if rule.vllm_version in known),
            vllm_version,
            self.model,
        )

    def without(self, kind: LimitKind) -> "Learned":
        """A copy without the rules of ``kind``."""
        return replace(self, rules=tuple(rule for rule in self.rules if rule.kind is not kind))

    def of_last_version(self) -> "Learned":
        """Only what was learned from the version of the latest start."""
        return self.of_version(self.starts[-1].vllm_version) if self.starts else self


def version(text: str) -> MinorVersion:
    """Major and minor version of vLLM; if ``text`` has none, the version that the constants were measured on."""
    return _stated_version(text) or MEASURED


def _stated_version(text: str) -> MinorVersion | None:
    found = re.match(r"(\d{1,9})\.(\d{1,9})", text)
    return (int(found[1]), int(found[2])) if found else None


def _correction_bytes(starts: Sequence[tuple[ReportedStart, int]], args: KnobValues, machine: Machine) -> int:
    """The median error of the starts, weighted by their similarity to ``args``.

    A start at twice (or half) the batch or the sequences has weight 0.6, at four times 0.14.
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
    """Whether a start is comparable with ``args``: same weights, dtypes and layout, same version of vLLM."""
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
    """Whether ``args`` leave no more KV tokens than the ones that crashed; without a shape, whether they are equal."""
    if shape is None:
        tuned = {name: value for name, value in args.items() if name in TUNED}
        return {**rule.args, "max_model_len": None} == {**tuned, "max_model_len": None}
    try:
        room, had = (memory.estimate(shape, a, machine).kv_tokens for a in (args, rule.args))
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        # Unreadable or out-of-range values: the repair rejects them before it checks lengths.
        return False
    return room <= had


START: TypeAdapter[ReportedStart] = TypeAdapter(ReportedStart)
RULE: TypeAdapter[LearnedLimit] = TypeAdapter(LearnedLimit)
_LEARNED: TypeAdapter[Learned] = TypeAdapter(Learned)


def to_json(learned: Learned) -> str:
    """Serializes ``learned`` for the file."""
    return _LEARNED.dump_json(learned).decode()


def read_history(path: Path, model: str) -> Learned:
    """Reads the history of ``model``; empty if the file is missing or belongs to another model.

    Raises:
        ValueError: the file is unreadable or damaged.
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
    """Identifies a model: its name, or for a local one its path and a hash of its config.json."""
    try:
        content = read_small_file(Path(model) / "config.json")
    except OSError:
        return model
    return f"{Path(model).resolve()} {hashlib.sha256(content).hexdigest()[:16]}"


def known_args(args: Mapping[str, object]) -> dict[str, Value] | None:
    """The engine arguments that the estimate or a rule depends on, as vLLM parses them.

    None if one of them is invalid: nothing can be learned from such a start.
    """
    scalars = {name: value for name in TUNED if isinstance(value := args.get(name), bool | int | float | str)}
    given = {name: as_number(name, value) for name, value in scalars.items()}
    return None if unreadable_argument(given) else dict(typed_arguments(given))


def ranks_of(args: Mapping[str, object]) -> int:
    """The number of GPUs that an engine uses: tensor-parallel times pipeline-parallel size."""
    sizes = (args.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size"))
    ranks = 1
    for size in sizes:
        ranks *= size if isinstance(size, int) and size > 0 else 1
    return ranks
