"""What earlier starts on this host taught: how far the memory estimate was off, and limits that it does not know.

The sidecar keeps both in its journal and writes them to a file; the plugin, the search and the command line read it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from vllm_sloguard import memory
from vllm_sloguard.activations import MEASURED, Version
from vllm_sloguard.knobs import Config, Value
from vllm_sloguard.machine import Machine
from vllm_sloguard.memory import Budget
from vllm_sloguard.model_shape import ModelShape
from vllm_sloguard.repair import TUNED, Limits

# The error of one start is trusted to a tenth less than whole, so that noise is not carried over as knowledge.
_PRIOR_WEIGHT = 0.1
# Arguments that change what is loaded or computed; each that differs halves a start's weight.
_SAME = ("dtype", "quantization", "tensor_parallel_size", "pipeline_parallel_size", "enforce_eager")
_DEFAULT_SEQS = 256


@dataclass(frozen=True)
class Start:
    """One start as vLLM reported it: ``kv_bytes`` is what its profiling pass left for the KV cache of one rank.

    ``args`` are those that the estimate depends on, as they ran; ``total_bytes`` is the device's memory. The other
    sizes are bytes of one rank, None where vLLM did not say.
    """

    args: Config
    kind: Literal["cuda", "cpu"]
    total_bytes: Annotated[int, Field(gt=0)]
    kv_bytes: int
    kv_tokens: int | None = None
    weights_bytes: int | None = None
    activation_bytes: int | None = None
    graph_bytes: int | None = None
    vllm_version: str = ""

    @property
    def machine(self) -> Machine:
        """The machine, as far as it matters to the estimate."""
        return Machine(self.kind, self.total_bytes, self.total_bytes, 1, "an earlier start")

    def error_bytes(self, shape: ModelShape) -> int:
        """What vLLM took beyond the estimate."""
        taken = memory.requested_bytes(self.args, self.machine) - self.kv_bytes
        return taken - memory.estimate(shape, self.args, self.machine, version=version(self.vllm_version)).fixed_bytes


class RuleKind(StrEnum):
    """What a learned rule limits; the names are those of ``repair.Limits``."""

    MAX_MODEL_LEN = "max_model_len"
    FREE_BYTES = "free_bytes"
    HEADROOM_BYTES = "headroom_bytes"


@dataclass(frozen=True)
class Rule:
    """A limit that a crash taught. ``args`` are those that crashed; times are seconds since the epoch."""

    kind: RuleKind
    value: int
    args: Config
    reason: str
    learned_at: float
    expires_at: float
    vllm_version: str = ""


@dataclass(frozen=True)
class Learned:
    """Everything that is known of one model on one host; ``vllm_version`` is the one that an estimate is for."""

    starts: tuple[Start, ...] = ()
    rules: tuple[Rule, ...] = ()
    vllm_version: str = ""

    def estimate(self, shape: ModelShape, args: Config, machine: Machine) -> Budget:
        """``memory.estimate``, corrected by the errors of earlier starts."""
        correction = self.correction_bytes(shape, args, machine)
        return memory.estimate(shape, args, machine, version=version(self.vllm_version), correction_bytes=correction)

    def correction_bytes(self, shape: ModelShape, args: Config, machine: Machine) -> int:
        """The mean error of the starts on such a machine, each weighed by how like ``args`` it was.

        A start a doubling of the batch or of the sequences away weighs 0.6 of one that is the same, two doublings 0.14.
        """
        # A stated cache says nothing of what the rest takes.
        starts = [start for start in self.starts if "kv_cache_memory_bytes" not in start.args]
        weights = [_likeness(start, args, machine) for start in starts]
        errors = [start.error_bytes(shape) for start in starts]
        weighed = math.fsum(weight * error for weight, error in zip(weights, errors, strict=True))
        return int(weighed / (math.fsum(weights) + _PRIOR_WEIGHT))

    def limits(self, shape: ModelShape | None, args: Config, machine: Machine, now: float) -> Limits:
        """What the rules that still hold at ``now`` say about ``args``."""
        alive = [rule for rule in self.rules if rule.expires_at > now]
        lengths = [
            r.value for r in alive if r.kind is RuleKind.MAX_MODEL_LEN and _no_more_room(r, shape, args, machine)
        ]
        free = [r.value for r in alive if r.kind is RuleKind.FREE_BYTES]
        return Limits(
            max_model_len=min(lengths, default=None),
            free_bytes=min(free, default=None),
            headroom_bytes=sum(r.value for r in alive if r.kind is RuleKind.HEADROOM_BYTES),
        )

    def of_version(self, vllm_version: str) -> "Learned":
        """What was learned from this version of vLLM, or from one that did not say."""
        known = ("", vllm_version)
        return Learned(
            tuple(start for start in self.starts if start.vllm_version in known),
            tuple(rule for rule in self.rules if rule.vllm_version in known),
            vllm_version,
        )

    def of_last_version(self) -> "Learned":
        """What was learned from the version that was started last."""
        return self.of_version(self.starts[-1].vllm_version) if self.starts else self


def version(text: str) -> Version:
    """Major and minor of a version of vLLM; the one that the estimate was measured on where there is none."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})", text)
    return (int(found[1]), int(found[2])) if found else MEASURED


def _likeness(start: Start, args: Config, machine: Machine) -> float:
    if start.kind != machine.kind:
        return 0.0
    batch = math.log2(memory.batched_tokens(args, machine) / memory.batched_tokens(start.args, start.machine))
    seqs = math.log2(_seqs(args) / _seqs(start.args))
    differing = sum(start.args.get(name) != args.get(name) for name in _SAME)
    return math.exp(-(batch**2 + seqs**2) / 2) / 2**differing


def _seqs(args: Config) -> int:
    return max(1, int(args.get("max_num_seqs", _DEFAULT_SEQS)))


def _no_more_room(rule: Rule, shape: ModelShape | None, args: Config, machine: Machine) -> bool:
    """Whether ``args`` leave no more KV tokens than those that crashed; without a model, whether they are the same."""
    if shape is None:
        return {**rule.args, "max_model_len": None} == {**args, "max_model_len": None}
    try:
        room, had = (memory.estimate(shape, a, machine).kv_tokens for a in (args, rule.args))
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        # Values that vLLM can't read, or out of range: the repair says so before it looks at lengths.
        return False
    return room <= had


START: TypeAdapter[Start] = TypeAdapter(Start)
RULE: TypeAdapter[Rule] = TypeAdapter(Rule)
_LEARNED: TypeAdapter[Learned] = TypeAdapter(Learned)


def to_json(learned: Learned) -> str:
    """As the file holds it."""
    return _LEARNED.dump_json(learned).decode()


def read(path: Path) -> Learned:
    """What ``path`` holds; nothing where there is no such file.

    Raises:
        ValueError: it can't be read or is damaged.
    """
    try:
        return _LEARNED.validate_json(path.read_bytes())
    except FileNotFoundError:
        return Learned()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"{path}: damaged: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def known_args(args: Mapping[str, object]) -> dict[str, Value]:
    """Those of an engine's arguments that the estimate or a rule depends on."""
    return {name: value for name in TUNED if isinstance(value := args.get(name), bool | int | float | str)}


def ranks_of(args: Mapping[str, object]) -> int:
    """GPUs that an engine takes: tensor times pipeline parallel."""
    sizes = (args.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size"))
    ranks = 1
    for size in sizes:
        ranks *= size if isinstance(size, int) and size > 0 else 1
    return ranks
