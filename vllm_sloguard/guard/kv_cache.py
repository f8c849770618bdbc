"""How vLLM divides the KV cache of one rank into blocks, and how many a request takes.

Layers of the same kind share a block table. Models with windowed and full attention have groups of equal size that
allocate blocks from one pool: a block holds ``block_size`` tokens of one group's layers (v1/core/kv_cache_utils.py of
0.32: get_kv_cache_groups, get_kv_cache_config_from_groups). Exact for full attention, MLA, windows and mixtures of
them; an upper bound if ``shape.hybrid``. Other kinds of cache are only known from vLLM's own classes (built_model.py).
"""

import math
from dataclasses import dataclass

from vllm_sloguard.guard.built_model import BuiltGroup, BuiltModel, GroupKind
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.model_shape import DTYPE_BYTES, ModelShape
from vllm_sloguard.guard.vllm_defaults import (
    block_size,
    dtype_bytes,
    pipeline_parallel,
    step_tokens,
    steps_in_flight,
    tensor_parallel,
)
from vllm_sloguard.guard.weights import stages
from vllm_sloguard.knobs import KnobValues

# The rows of opaque MLA layouts: 512 values, their scales, and the rope part (mla_attention.py, get_kv_cache_spec).
_MLA_ROWS = {"fp8_ds_mla": 656, "nvfp4_ds_mla": 352}


@dataclass(frozen=True)
class BlockGroup:
    """Layers that share a block table; a request holds at most ``most_tokens`` in it (None: unlimited).

    ``extra_blocks`` come in addition. ``ranks`` is the number of ranks that share the tokens.
    """

    block_size: int
    most_tokens: int | None = None
    extra_blocks: int = 0
    ranks: int = 1

    def request_blocks(self, length: int) -> int:
        """Blocks that a request of ``length`` tokens takes at most."""
        held = length if self.most_tokens is None else min(self.most_tokens, length)
        own = math.ceil(held / self.ranks) if self.ranks > 1 else held
        return -(-own // self.block_size) + self.extra_blocks


@dataclass(frozen=True)
class KvLayout:
    """The block pool of one rank, shared by all groups; ``bytes_per_block`` is that of the fullest group."""

    bytes_per_block: int
    groups: tuple[BlockGroup, ...]

    def blocks(self, kv_bytes: int) -> int:
        """Blocks that fit into ``kv_bytes``."""
        return max(0, kv_bytes) // self.bytes_per_block if self.bytes_per_block else 0

    def request_blocks(self, length: int) -> int:
        """Blocks that a request of ``length`` tokens takes at most."""
        return sum(group.request_blocks(length) for group in self.groups)

    def longest_request(self, blocks: int, longest: int) -> int:
        """The longest request that fits into ``blocks``, at most ``longest`` tokens; 0 if none fits.

        vLLM uses the same search (_estimate_max_model_len_from_groups).
        """
        low, high = 0, longest
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.request_blocks(middle) <= blocks else (low, middle - 1)
        return low


def layout(shape: ModelShape, args: KnobValues, machine: Machine, stage: range | None = None) -> KvLayout:
    """The pool of a rank of ``stage``; by default, of the stage with the largest blocks."""
    if stage is None:
        every = [layout(shape, args, machine, each) for each in stages(shape, args)]
        return max(every, key=lambda each: each.bytes_per_block)
    tokens = block_size(shape, args, machine)
    page = tokens * _layer_bytes_per_token(shape, args)
    window = BlockGroup(tokens, (shape.sliding_window or 0) - 1 + _in_flight(shape, args, machine), 1)
    if not shape.windowed or args.get("disable_hybrid_kv_cache_manager"):
        only = window if shape.sliding_window and not shape.windowed else BlockGroup(tokens)
        return KvLayout(page * _kv_layers(shape, len(stage)), (only,))
    full_groups, window_groups = _groups(shape)
    windowed = sum(shape.windowed[stage.start : stage.stop])
    largest = max(-(-(len(stage) - windowed) // full_groups), -(-windowed // window_groups))
    return KvLayout(page * largest, (*[BlockGroup(tokens)] * full_groups, *[window] * window_groups))


def _kv_layers(shape: ModelShape, layers: int) -> int:
    """How many of ``layers`` cache keys and values."""
    return layers if shape.kv_layers is None else -(-layers * shape.kv_layers // shape.layers)


def _in_flight(shape: ModelShape, args: KnobValues, machine: Machine) -> int:
    """Tokens that are computed before blocks outside the window are freed (max_in_flight_tokens)."""
    return steps_in_flight(args, machine) * step_tokens(shape, args, machine)


def built_layouts(built: BuiltModel, shape: ModelShape, args: KnobValues, machine: Machine) -> tuple[KvLayout, ...]:
    """The pool of each pipeline stage, from vLLM's own groups (kv_cache_interface.py)."""
    groups = tuple(_built_group(group, shape, args, machine) for group in built.groups)
    return tuple(KvLayout(stage.bytes_per_block, groups) for stage in built.stages)


def _built_group(group: BuiltGroup, shape: ModelShape, args: KnobValues, machine: Machine) -> BlockGroup:
    match group.kind:
        case GroupKind.FULL:
            return BlockGroup(group.block_size, ranks=group.ranks)
        case GroupKind.WINDOW:
            # A window may begin inside a block.
            return BlockGroup(group.block_size, group.tokens + _in_flight(shape, args, machine), 1)
        case GroupKind.CHUNK:
            return BlockGroup(group.block_size, group.tokens + _in_flight(shape, args, machine))
        case GroupKind.ENCODER:
            # The scheduler reserves a step's tokens for the encoder (max_num_encoder_input_tokens).
            return BlockGroup(group.block_size, 0, -(-step_tokens(shape, args, machine) // group.block_size))
        case GroupKind.STATE:
            return BlockGroup(group.block_size, 0, group.tokens)


def _groups(shape: ModelShape) -> tuple[int, int]:
    """The number of groups for layers with full attention and with a window, over all stages.

    A group has as many layers as the rarer kind, or as the more common one if that has less than 1.5 times as many; the
    last groups may be incomplete, which wastes memory (_get_kv_cache_groups_uniform_page_size).
    """
    windowed = sum(shape.windowed)
    full = shape.layers - windowed
    fewest, most = sorted((full, windowed))
    size = most if most < 1.5 * fewest else fewest
    return -(-full // size), -(-windowed // size)


def kv_bytes_per_token(shape: ModelShape, args: KnobValues) -> int:
    """Bytes of one token in all layers of a rank of the fullest stage: the sum of vLLM's KV-cache specs.

    Attention caches a key and a value for each of max(1, kv_heads / TP) heads; MLA one latent vector, which TP
    does not divide (attention.py and mla_attention.py, get_kv_cache_spec).
    """
    if shape.stated_kv_bytes_per_token is not None:
        return _layer_bytes_per_token(shape, args)
    layers = -(-shape.layers // min(pipeline_parallel(args), shape.layers))
    return max(1, _kv_layers(shape, layers)) * _layer_bytes_per_token(shape, args)


def _layer_bytes_per_token(shape: ModelShape, args: KnobValues) -> int:
    kind = str(args.get("kv_cache_dtype", "auto"))
    if kind == "auto" and shape.quantization is not None and shape.quantization.fp8_kv:
        kind = "fp8"
    if shape.stated_kv_bytes_per_token is not None:
        return max(1, shape.stated_kv_bytes_per_token // (2 if kind.startswith("fp8") else 1))
    if shape.mla and kind in _MLA_ROWS:
        return _MLA_ROWS[kind]
    element = 1 if kind.startswith(("fp8", "int8")) else DTYPE_BYTES.get(kind, dtype_bytes(shape, args))
    if shape.mla:
        return (shape.kv_lora_rank + shape.qk_rope_head_dim) * element
    kv_heads = max(1, shape.kv_heads // tensor_parallel(args))
    head_bytes = 2 * shape.head_dim * element
    # Scales stored with each head's data (triton_attn.py, customize_spec).
    return kv_heads * (head_bytes + 8 if kind.endswith("per_token_head") else head_bytes)
