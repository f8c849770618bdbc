"""The KV-cache budget of a configuration, computed instead of tried.

vLLM takes a share of the device, subtracts what it holds without the KV cache, and cuts the rest into blocks. The
formulas are those of its 0.26 and 0.32 sources; the constants are measured on an H200 with 0.26 (Qwen2-1.5B's shape)
and on the CPU build of 0.32, as said beside each. Sizes are bytes on one rank, that of the pipeline stage which has
room for the fewest tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from vllm_sloguard.guard.activation_memory import (
    COUNTS_GRAPHS,
    COUNTS_STATE,
    MEASURED,
    MEASURED_ACTIVATIONS,
    MinorVersion,
    activation_bytes,
    graph_bytes,
    sampler_state_bytes,
    sampling_bytes,
)
from vllm_sloguard.guard.cuda_allocator import unused_bytes
from vllm_sloguard.guard.evidence import ERROR_BANDS, NO_EVIDENCE, UNMEASURED_ACTIVATIONS, ModelEvidence, Rung
from vllm_sloguard.guard.kv_cache import KvLayout, built_layouts, kv_bytes_per_token, layout
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.model_shape import ModelShape
from vllm_sloguard.guard.vllm_defaults import (
    DEFAULT_UTILIZATION,
    GIB,
    batched_tokens,
    block_size,
    dtype_bytes,
    max_model_len,
    pipeline_parallel,
)
from vllm_sloguard.guard.weights import largest_tensors, shares_of_checkpoint, stages, weights_bytes
from vllm_sloguard.knobs import KnobValues

__all__ = [
    "DEFAULT_UTILIZATION",
    "GIB",
    "Budget",
    "batched_tokens",
    "block_size",
    "estimate",
    "explicit_kv_bytes",
    "gib",
    "kv_bytes_per_token",
    "max_model_len",
    "requested_bytes",
    "weights_bytes",
]

# What an H200 (0.26) lost to nothing else that is counted here, in 29 starts of five models: CUDA's context and
# libraries after the snapshot, and input buffers; compiled and with graphs captured, a little more.
_CUDA_OVERHEAD, _COMPILED_OVERHEAD = int(0.24 * GIB), int(0.034 * GIB)
# The resident size of a CPU worker with a model of next to no weights: 0.68 GiB.
_CPU_OVERHEAD = int(0.68 * GIB)


@dataclass(frozen=True)
class Budget:
    """Where one rank's memory goes. ``starts`` is a verdict on memory alone; ``reason`` says why, in numbers.

    ``kv_tokens`` and ``concurrency`` are what vLLM prints as "KV cache size" and "Maximum concurrency": requests of
    max_model_len that fit at once, and their tokens; concurrency is None where that length is unknown.
    ``request_bytes`` is the KV cache without which vLLM does not start: one such request, and the block that it keeps
    back. It starts from ``lowest_utilization`` on, up to ``highest_utilization``, beyond which the share is not free;
    each is None where the share does not matter, and no share will do where the lowest is above the highest or 1.
    ``outside_bytes`` is taken beside the share by versions that do not count it.

    ``rung`` says what the estimate rests on, ``margin_bytes`` how far it may be off. ``exact_layout`` is unset where
    the layers keep something that the formulas do not know, and vLLM was not asked.
    """

    weights_bytes: int
    activation_bytes: int
    graph_bytes: int
    overhead_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    requested_bytes: int
    outside_bytes: int
    starts: bool
    reason: str
    margin_bytes: int
    concurrency: float | None
    lowest_utilization: float | None
    highest_utilization: float | None
    request_bytes: int = 0
    rung: Rung = Rung.FORMULA
    exact_layout: bool = True

    @property
    def fixed_bytes(self) -> int:
        """Everything but the KV cache."""
        return self.weights_bytes + self.activation_bytes + self.graph_bytes + self.overhead_bytes

    @property
    def proves_weights(self) -> bool:
        """Whether a refusal may rest on the weights."""
        return self.rung is not Rung.FORMULA

    @property
    def proves_cache(self) -> bool:
        """Whether a refusal may rest on what the KV cache needs, too."""
        return self.proves_weights and self.exact_layout

    @property
    def dependable(self) -> bool:
        """Whether a configuration may be changed for it."""
        return self.proves_weights or self.exact_layout


@dataclass(frozen=True)
class _Rank:
    weights_bytes: int
    cache: KvLayout


def estimate(
    shape: ModelShape,
    args: KnobValues,
    machine: Machine,
    *,
    version: MinorVersion = MEASURED,
    correction_bytes: int = 0,
    evidence: ModelEvidence = NO_EVIDENCE,
) -> Budget:
    """The budget of ``args`` (EngineArgs names; absent means vLLM's default) for a model on a machine.

    ``version`` is vLLM's: newer ones count more of what they take. ``correction_bytes`` is what earlier starts took
    beyond the estimate (start_history.py), counted as overhead; ``evidence`` replaces formulas by what is known. Values
    must have their own types and lie in their ranges; ``repair`` sees to it.
    """
    plain = activation_bytes(shape, args, machine)
    activation = max(plain, sampling_bytes(shape, args, machine, version))
    state, captured = sampler_state_bytes(shape, args, machine), graph_bytes(shape, args, machine)
    graphs = captured if version >= COUNTS_GRAPHS else 0
    overhead = _overhead_bytes(shape, args, machine) + correction_bytes + (state if version >= COUNTS_STATE else 0)
    outside = (0 if version >= COUNTS_STATE else state) + captured - graphs
    requested, explicit = requested_bytes(args, machine), explicit_kv_bytes(args)
    others = activation + graphs + overhead

    def room(weights: int) -> int:
        return explicit if explicit is not None else requested - weights - others

    def blocks(rank: _Rank) -> float:
        return room(rank.weights_bytes) // rank.cache.bytes_per_block if rank.cache.bytes_per_block else math.inf

    # The stage with room for the fewest blocks decides for all (get_kv_cache_configs).
    rank = min(_ranks(shape, args, machine, evidence), key=lambda rank: (blocks(rank), -rank.weights_bytes))
    cache, weights = rank.cache, rank.weights_bytes
    kv, fixed = room(weights), weights + others
    length = max_model_len(shape, args)
    tokens, concurrency = _capacity(shape, cache, cache.blocks(kv), length)
    # Where nothing is cached, vLLM still needs a share with something left.
    need = max(1, (cache.request_blocks(length if length is not None else 1) + 1) * cache.bytes_per_block)
    problem = _problem(fixed, kv, requested, outside, machine, explicit=explicit is not None)
    if not problem and kv < need:
        longest = f"one request of {length or 1} tokens takes {gib(need)} GiB of KV"
        problem = f"{longest}, {gib(kv)} GiB ({tokens} tokens) are there"
    return Budget(
        weights_bytes=weights,
        activation_bytes=activation,
        graph_bytes=graphs,
        overhead_bytes=overhead,
        kv_bytes=kv,
        kv_bytes_per_token=_bytes_per_token(shape, args, evidence),
        kv_tokens=tokens,
        requested_bytes=requested,
        outside_bytes=outside,
        starts=not problem,
        reason=problem or f"{tokens} KV tokens in {gib(kv)} GiB",
        margin_bytes=_margin_bytes(shape, evidence.rung, weights, plain, activation, fixed),
        concurrency=concurrency,
        lowest_utilization=None if explicit is not None else _thousandths(math.ceil, fixed + need, machine),
        highest_utilization=None
        if explicit is not None and machine.kind == "cpu"
        else _thousandths(math.floor, max(0, machine.free_bytes - outside), machine),
        request_bytes=need,
        rung=evidence.rung,
        exact_layout=evidence.built is not None or shape.ordinary,
    )


def _ranks(shape: ModelShape, args: KnobValues, machine: Machine, evidence: ModelEvidence) -> list[_Rank]:
    """Weights and KV pool of each pipeline stage."""
    built, reported = evidence.built, evidence.reported_weights_bytes
    if built is not None:
        layouts = built_layouts(built, shape, args, machine)
        ranks = [_Rank(stage.weights_bytes, cache) for stage, cache in zip(built.stages, layouts, strict=True)]
    else:
        parts = [weights_bytes(shape, args, stage) for stage in stages(shape, args)]
        if evidence.checkpoint_bytes is not None:
            parts = shares_of_checkpoint(evidence.checkpoint_bytes, parts, args)
        layouts = tuple(layout(shape, args, machine, stage) for stage in stages(shape, args))
        ranks = [_Rank(weights, cache) for weights, cache in zip(parts, layouts, strict=True)]
    if reported is not None:
        ranks = [_Rank(reported, rank.cache) for rank in ranks]
    return ranks


def _bytes_per_token(shape: ModelShape, args: KnobValues, evidence: ModelEvidence) -> int:
    if evidence.built is None:
        return kv_bytes_per_token(shape, args)
    return max(stage.bytes_per_token for stage in evidence.built.stages)


def _margin_bytes(  # noqa: PLR0917 - the parts of a budget
    shape: ModelShape, rung: Rung, weights: int, plain: int, activation: int, fixed: int
) -> int:
    """How far the estimate may be off: the rung's band, and what is unknown of the profile run."""
    band = ERROR_BANDS[rung].error_bytes(weights, plain, fixed - weights - plain)
    if rung is Rung.REPORTED:
        return band
    guessed = 0 if shape.model_type in MEASURED_ACTIVATIONS else int(UNMEASURED_ACTIVATIONS * plain)
    return band + guessed + activation - plain


def _overhead_bytes(shape: ModelShape, args: KnobValues, machine: Machine) -> int:
    if machine.kind == "cpu":
        return _CPU_OVERHEAD
    # Cosines and sines of every position (rotary_embedding/base.py).
    rotary = (shape.max_position_embeddings or 0) * shape.head_dim * dtype_bytes(shape, args)
    unused = unused_bytes(largest_tensors(shape, args), -(-shape.layers // pipeline_parallel(args)))
    return _CUDA_OVERHEAD + (0 if args.get("enforce_eager") else _COMPILED_OVERHEAD) + rotary + unused


def _capacity(shape: ModelShape, cache: KvLayout, blocks: int, length: int | None) -> tuple[int, float | None]:
    """Tokens and concurrency as vLLM prints them: whole requests of max_model_len count (get_kv_cache_capacity).

    Where that is left to vLLM (-1), it is the longest that fits (_auto_fit_max_model_len). Where nothing is known of
    it, the tokens are those of all blocks.
    """
    if length is None and shape.max_model_len is not None:
        length = cache.longest_request(blocks - 1, shape.max_model_len) or None
    if length is None:
        return (blocks * cache.groups[0].block_size // len(cache.groups) if cache.groups else 0), None
    taken = cache.request_blocks(length)
    return (blocks * length // taken, ratio(blocks, taken)) if taken else (0, None)


def _problem(fixed: int, kv: int, requested: int, outside: int, machine: Machine, *, explicit: bool) -> str:
    free = machine.free_bytes
    # CUDA checks the share even where kv_cache_memory_bytes replaces it (gpu_worker.py, request_memory); the CPU
    # backend does not (cpu_worker.py of 0.32). On an H200, 0.26 passed its check with 0.1 GiB to spare, and then ran
    # out of memory on the sampler's state.
    if requested + outside > free and not (explicit and machine.kind == "cpu"):
        beside = f" and {gib(outside)} GiB beside them" if outside else ""
        return f"requested {gib(requested)} GiB{beside} exceed the {gib(free)} GiB that are free"
    if kv <= 0:
        return f"weights and activations take {gib(fixed)} of {gib(requested)} GiB: none is left for KV"
    if fixed + kv + outside > free:
        return f"{gib(fixed + outside)} GiB and {gib(kv)} GiB of KV exceed the {gib(free)} GiB that are free"
    return ""


def requested_bytes(args: KnobValues, machine: Machine) -> int:
    """What vLLM claims of the device: ceil(total * gpu_memory_utilization) (worker/utils.py, request_memory)."""
    return math.ceil(machine.total_bytes * float(args.get("gpu_memory_utilization", DEFAULT_UTILIZATION)))


def explicit_kv_bytes(args: KnobValues) -> int | None:
    """kv_cache_memory_bytes, None where vLLM sizes the cache itself."""
    value = args.get("kv_cache_memory_bytes")
    return int(value) if value is not None else None


def ratio(part: int, whole: int) -> float:
    """``part / whole``, infinite where that is no float."""
    try:
        return part / whole
    except (OverflowError, ZeroDivisionError):
        return math.inf


def gib(size: int) -> str:
    """Bytes as GiB, for people."""
    return f"{ratio(size, GIB):.2f}"


def _thousandths(whole: Callable[[float], int], size: int, machine: Machine) -> float:
    share = ratio(size, machine.total_bytes) * 1000
    return whole(share) / 1000 if math.isfinite(share) else share
