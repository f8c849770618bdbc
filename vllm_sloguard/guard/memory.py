"""The KV-cache budget of a configuration, computed without starting vLLM.

vLLM takes a share of the device, subtracts everything but the KV cache, and divides the rest into blocks. The formulas
follow the sources of 0.26 and 0.32; constants were measured on an H200 with 0.26 (Qwen2-1.5B's shape) and on the CPU
build of 0.32, as noted at each. Sizes are bytes per rank, of the pipeline stage with room for the fewest tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from vllm_sloguard.guard.activation_memory import (
    COUNTS_GRAPHS,
    COUNTS_STATE,
    MEASURED,
    MinorVersion,
    activation_bytes,
    graph_bytes,
    sampler_state_bytes,
    sampling_bytes,
)
from vllm_sloguard.guard.cuda_allocator import unused_bytes
from vllm_sloguard.guard.evidence import NO_EVIDENCE, RECORDED_ERRORS, ModelEvidence, Rung
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

# Memory not otherwise accounted for, in 29 starts of five models on an H200 (0.26): CUDA's context and libraries after
# the snapshot, and input buffers; slightly more when compiled and with captured graphs.
_CUDA_OVERHEAD, _COMPILED_OVERHEAD = int(0.24 * GIB), int(0.034 * GIB)
# The resident size of a CPU worker with a model of negligible weights: 0.68 GiB.
_CPU_OVERHEAD = int(0.68 * GIB)


@dataclass(frozen=True)
class Budget:
    """How one rank's memory is used. ``starts`` judges memory only; ``reason`` has the arithmetic.

    ``kv_tokens`` and ``concurrency`` are what vLLM prints as "KV cache size" and "Maximum concurrency": requests of
    max_model_len that fit at once, and their tokens; concurrency is None if that length is unknown.
    ``request_bytes`` is the least KV cache with which vLLM starts: one such request and a reserved block. vLLM starts
    with a share between ``lowest_utilization`` and ``highest_utilization``, above which the share is not free. Each is
    None if the share does not matter; if the lowest is above the highest, or above 1, no share is sufficient.
    ``outside_bytes`` is taken in addition to the share by versions that do not count it.

    ``rung`` is the source of the estimate, ``margin_bytes`` how far off it may be. ``exact_layout`` is false if layers
    cache something that the formulas do not cover, and vLLM was not asked.
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
        """Whether the estimate of the weights is reliable enough for a refusal."""
        return self.rung is not Rung.FORMULA

    @property
    def proves_cache(self) -> bool:
        """Whether the estimate of the KV cache is, too."""
        return self.proves_weights and self.exact_layout

    @property
    def dependable(self) -> bool:
        """Whether the estimate is reliable enough for a repair."""
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
    beyond the estimate (start_history.py), counted as overhead; ``evidence`` replaces formulas where available. Values
    must be valid and in range, which ``repair`` ensures.
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

    # The stage with room for the fewest blocks determines the number for all (get_kv_cache_configs).
    rank = min(_ranks(shape, args, machine, evidence), key=lambda rank: (blocks(rank), -rank.weights_bytes))
    cache, weights = rank.cache, rank.weights_bytes
    kv, fixed = room(weights), weights + others
    length = max_model_len(shape, args)
    tokens, concurrency = _capacity(shape, cache, cache.blocks(kv), length)
    # Even if nothing is cached, vLLM needs some memory left in its share.
    need = max(1, (cache.request_blocks(length if length is not None else 1) + 1) * cache.bytes_per_block)
    problem = _problem(fixed, kv, requested, outside, machine, explicit=explicit is not None)
    if not problem and kv < need:
        longest = f"one request of {length or 1:,} tokens takes {gib(need)} GiB of KV"
        problem = f"{longest}, only {gib(kv)} GiB ({tokens:,} tokens) are available"
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
        reason=problem or f"{tokens:,} KV tokens in {gib(kv)} GiB",
        margin_bytes=_margin_bytes(
            shape, evidence.rung, fixed, plain, 0 if version == MEASURED else activation - plain
        ),
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


def _margin_bytes(shape: ModelShape, rung: Rung, fixed: int, plain: int, assumed: int) -> int:
    """How far off the estimate may be: the rung's recorded error, and the uncertainty of the profile run.

    ``plain`` is its peak without sampling, ``assumed`` what sampling adds if it is not known to happen.
    """
    band = RECORDED_ERRORS.error_bytes(rung, fixed, ordinary=not shape.unusual)
    if rung is Rung.REPORTED:
        return band
    return band + assumed + RECORDED_ERRORS.profile_error_bytes(shape.model_type, plain, ordinary=not shape.unusual)


def _overhead_bytes(shape: ModelShape, args: KnobValues, machine: Machine) -> int:
    if machine.kind == "cpu":
        return _CPU_OVERHEAD
    # The cosine and sine cache (rotary_embedding/base.py).
    rotary = (shape.max_position_embeddings or 0) * shape.head_dim * dtype_bytes(shape, args)
    unused = unused_bytes(largest_tensors(shape, args), -(-shape.layers // pipeline_parallel(args)))
    return _CUDA_OVERHEAD + (0 if args.get("enforce_eager") else _COMPILED_OVERHEAD) + rotary + unused


def _capacity(shape: ModelShape, cache: KvLayout, blocks: int, length: int | None) -> tuple[int, float | None]:
    """Tokens and concurrency as vLLM prints them, in requests of max_model_len (get_kv_cache_capacity).

    With -1, max_model_len is the longest that fits (_auto_fit_max_model_len). If it is unknown, the tokens are those of
    all blocks.
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
        return f"weights and activations take {gib(fixed)} of {gib(requested)} GiB: nothing is left for the KV cache"
    if fixed + kv + outside > free:
        return f"{gib(fixed + outside)} GiB and {gib(kv)} GiB of KV exceed the {gib(free)} GiB that are free"
    return ""


def requested_bytes(args: KnobValues, machine: Machine) -> int:
    """What vLLM claims of the device: ceil(total * gpu_memory_utilization) (worker/utils.py, request_memory)."""
    return math.ceil(machine.total_bytes * float(args.get("gpu_memory_utilization", DEFAULT_UTILIZATION)))


def explicit_kv_bytes(args: KnobValues) -> int | None:
    """kv_cache_memory_bytes; None if vLLM sizes the cache itself."""
    value = args.get("kv_cache_memory_bytes")
    return int(value) if value is not None else None


def ratio(part: int, whole: int) -> float:
    """``part / whole``; infinite if that overflows."""
    try:
        return part / whole
    except (OverflowError, ZeroDivisionError):
        return math.inf


def gib(size: int) -> str:
    """Bytes as text in GiB."""
    return f"{ratio(size, GIB):.2f}"


def _thousandths(whole: Callable[[float], int], size: int, machine: Machine) -> float:
    share = ratio(size, machine.total_bytes) * 1000
    return whole(share) / 1000 if math.isfinite(share) else share
