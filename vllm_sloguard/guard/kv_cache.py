"""How vLLM cuts the KV cache of one rank into blocks, and how many of them a request takes.

Layers that keep the same share a block table. Where some attend to a window and others don't, they are dealt into
groups of equal size, all of which draw blocks from one pool: a block holds ``block_size`` tokens of one group's layers
(v1/core/kv_cache_utils.py of 0.32: get_kv_cache_groups, get_kv_cache_config_from_groups). Exact for full attention,
MLA, windows and mixtures of the two; an upper bound of bytes where ``shape.hybrid``.
"""

from dataclasses import dataclass

from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.model_shape import DTYPE_BYTES, ModelShape
from vllm_sloguard.guard.vllm_defaults import (
    block_size,
    dtype_bytes,
    max_model_len,
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
class KvLayout:
    """The pool of blocks of one rank. ``bytes_per_block`` is that of the fullest group.

    A request of some length takes blocks for all its tokens in each of ``full_groups``, and in each of
    ``window_groups`` for no more than ``window_tokens``.
    """

    block_size: int
    bytes_per_block: int
    full_groups: int
    window_groups: int
    window_tokens: int

    def blocks(self, kv_bytes: int) -> int:
        """Blocks that fit into so many bytes."""
        return max(0, kv_bytes) // self.bytes_per_block

    def request_blocks(self, length: int) -> int:
        """Blocks that a request of ``length`` tokens takes at most.

        A window may begin within a block: it takes one more (kv_cache_interface.py, SlidingWindowSpec).
        """
        full = -(-length // self.block_size)
        windowed = -(-min(self.window_tokens, length) // self.block_size) + 1
        return self.full_groups * full + self.window_groups * windowed

    def longest_request(self, blocks: int, longest: int) -> int:
        """The longest request, at most ``longest`` tokens, that ``blocks`` hold; 0 where none does.

        What vLLM finds by search (_estimate_max_model_len_from_groups).
        """
        low, high = 0, longest
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.request_blocks(middle) <= blocks else (low, middle - 1)
        return low


def layout(shape: ModelShape, args: KnobValues, machine: Machine, stage: range | None = None) -> KvLayout:
    """The pool of a rank of ``stage``; of the stage with the largest blocks where none is given."""
    if stage is None:
        every = [layout(shape, args, machine, each) for each in stages(shape, args)]
        return max(every, key=lambda each: each.bytes_per_block)
    tokens = block_size(shape, args, machine)
    page = tokens * _layer_bytes_per_token(shape, args)
    # The window itself, and what is computed before its older part is given back (max_in_flight_tokens).
    window = shape.sliding_window or 0
    held = window - 1 + steps_in_flight(args, machine) * step_tokens(shape, args, machine)
    if not shape.windowed or args.get("disable_hybrid_kv_cache_manager"):
        only = (0, 1) if window and not shape.windowed else (1, 0)
        return KvLayout(tokens, page * len(stage), *only, held)
    full_groups, window_groups = _groups(shape)
    windowed = sum(shape.windowed[stage.start : stage.stop])
    largest = max(-(-(len(stage) - windowed) // full_groups), -(-windowed // window_groups))
    return KvLayout(tokens, page * largest, full_groups, window_groups, held)


def _groups(shape: ModelShape) -> tuple[int, int]:
    """Into how many groups the layers with full attention and with a window are dealt, over all stages.

    As many layers a group as the rarer kind has, or the commoner one where that has less than half as many again;
    the last groups may be short, which wastes memory (_get_kv_cache_groups_uniform_page_size).
    """
    windowed = sum(shape.windowed)
    full = shape.layers - windowed
    fewest, most = sorted((full, windowed))
    size = most if most < 1.5 * fewest else fewest
    return -(-full // size), -(-windowed // size)


def kv_bytes_per_token(shape: ModelShape, args: KnobValues) -> int:
    """Bytes of one token in all layers of a rank of the fullest stage: the sum of vLLM's KV-cache specs.

    Attention keeps a key and a value for each of max(1, kv_heads / TP) heads; MLA keeps one latent vector, which TP
    does not divide (attention.py and mla_attention.py, get_kv_cache_spec).
    """
    if shape.stated_kv_bytes_per_token is not None:
        return _layer_bytes_per_token(shape, args)
    return -(-shape.layers // min(pipeline_parallel(args), shape.layers)) * _layer_bytes_per_token(shape, args)


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
    # Scales beside each head's data (triton_attn.py, customize_spec).
    return kv_heads * (head_bytes + 8 if kind.endswith("per_token_head") else head_bytes)


def request_tokens(shape: ModelShape, args: KnobValues, machine: Machine) -> int | None:
    """KV tokens whose bytes vLLM wants before it starts with max_model_len; None where it fits the length itself (-1).

    Whole blocks of one longest request, and the block that newer versions keep back, in units of
    ``kv_bytes_per_token`` (_check_enough_kv_cache_memory).
    """
    length = max_model_len(shape, args)
    if length is None:
        return None
    cache = layout(shape, args, machine)
    return -(-(cache.request_blocks(length) + 1) * cache.bytes_per_block // kv_bytes_per_token(shape, args))


def longest_request(shape: ModelShape, args: KnobValues, machine: Machine, kv_bytes: int, longest: int) -> int:
    """The longest request, at most ``longest`` tokens, with which vLLM starts on ``kv_bytes``; 0 where none fits.

    What vLLM 0.32 proposes in "the estimated maximum model length is N".
    """
    cache = layout(shape, args, machine)
    return cache.longest_request(cache.blocks(kv_bytes) - 1, longest)
