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
    MinorVersion,
    activation_bytes,
    graph_bytes,
    sampler_state_bytes,
)
from vllm_sloguard.guard.cuda_allocator import unused_bytes
from vllm_sloguard.guard.kv_cache import KvLayout, kv_bytes_per_token, layout, longest_request, request_tokens
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
from vllm_sloguard.guard.weights import largest_tensors, stages, weights_bytes
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
    "longest_request",
    "max_model_len",
    "request_tokens",
    "requested_bytes",
    "weights_bytes",
]

# What an H200 (0.26) lost to nothing else that is counted here, in 29 starts of five models: CUDA's context and
# libraries after the snapshot, and input buffers; compiled and with graphs captured, a little more.
_CUDA_OVERHEAD, _COMPILED_OVERHEAD = int(0.24 * GIB), int(0.034 * GIB)
# The resident size of a CPU worker with a model of next to no weights: 0.68 GiB.
_CPU_OVERHEAD = int(0.68 * GIB)
# How far the estimate may be off: several times its error, as a share of all that is fixed. That was within 1% for the
# weights of eleven architectures, and on a GPU within 0.04 GiB of 4 to 63 in 28 starts of five models, on which the
# constants were set, and within 0.08 in 27 starts of six others. A model of unknown shape has guessed activations.
_MARGIN, _MARGIN_STATED = 0.01, 0.3


@dataclass(frozen=True)
class Budget:
    """Where one rank's memory goes. ``starts`` is a verdict on memory alone; ``reason`` says why, in numbers.

    ``kv_tokens`` and ``concurrency`` are what vLLM prints as "KV cache size" and "Maximum concurrency": requests of
    max_model_len that fit at once, and their tokens; concurrency is None where that length is unknown. It starts from
    ``lowest_utilization`` on, up to ``highest_utilization``, beyond which the share is not free; each is None where
    the share does not matter, and no share will do where the lowest is above the highest or 1. ``outside_bytes`` is
    taken beside the share by versions that do not count it. ``margin_bytes`` is how far the estimate may be off.
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

    @property
    def fixed_bytes(self) -> int:
        """Everything but the KV cache."""
        return self.weights_bytes + self.activation_bytes + self.graph_bytes + self.overhead_bytes


def estimate(
    shape: ModelShape,
    args: KnobValues,
    machine: Machine,
    *,
    version: MinorVersion = MEASURED,
    correction_bytes: int = 0,
) -> Budget:
    """The budget of ``args`` (EngineArgs names; absent means vLLM's default) for a model on a machine.

    ``version`` is vLLM's: newer ones count more of what they take (activations.py). ``correction_bytes`` is what
    earlier starts took beyond the estimate (learned.py), counted as overhead. Values must have their own types
    and lie in their ranges; ``repair`` sees to it. Within 1.1% of the KV tokens that vLLM reported for ordinary
    decoders; an upper bound of the bytes that a token takes where ``shape.hybrid``.
    """
    activation = activation_bytes(shape, args, machine)
    state, captured = sampler_state_bytes(shape, args, machine), graph_bytes(shape, args, machine)
    graphs = captured if version >= COUNTS_GRAPHS else 0
    overhead = _overhead_bytes(shape, args, machine) + correction_bytes + (state if version >= COUNTS_STATE else 0)
    outside = (0 if version >= COUNTS_STATE else state) + captured - graphs
    requested, explicit = requested_bytes(args, machine), explicit_kv_bytes(args)
    others = activation + graphs + overhead

    def room(weights: int) -> int:
        return explicit if explicit is not None else requested - weights - others

    ranks = [(weights_bytes(shape, args, stage), layout(shape, args, machine, stage)) for stage in stages(shape, args)]
    # The stage with room for the fewest blocks decides for all (get_kv_cache_configs).
    weights, cache = min(ranks, key=lambda rank: (room(rank[0]) // rank[1].bytes_per_block, -rank[0]))
    kv, fixed = room(weights), weights + others
    length = max_model_len(shape, args)
    tokens, concurrency = _capacity(shape, cache, cache.blocks(kv), length)
    need = (cache.request_blocks(length if length is not None else 1) + 1) * cache.bytes_per_block
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
        kv_bytes_per_token=kv_bytes_per_token(shape, args),
        kv_tokens=tokens,
        requested_bytes=requested,
        outside_bytes=outside,
        starts=not problem,
        reason=problem or f"{tokens} KV tokens in {gib(kv)} GiB",
        margin_bytes=int(
            _MARGIN * fixed + (_MARGIN_STATED * activation if shape.stated_weights_bytes is not None else 0)
        ),
        concurrency=concurrency,
        lowest_utilization=None if explicit is not None else _thousandths(math.ceil, fixed + need, machine),
        highest_utilization=None
        if explicit is not None and machine.kind == "cpu"
        else _thousandths(math.floor, max(0, machine.free_bytes - outside), machine),
    )


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
        return blocks * cache.block_size // (cache.full_groups + cache.window_groups), None
    taken = cache.request_blocks(length)
    return blocks * length // taken, ratio(blocks, taken)


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
