"""The KV-cache budget of a configuration, computed instead of tried.

vLLM takes a share of the device, subtracts what it holds without the KV cache, and cuts the rest into blocks. The
formulas are those of its 0.26 and 0.32 sources; the constants are measured on an H200 with 0.26 (Qwen2-1.5B's shape)
and on the CPU build of 0.32, as said beside each. Sizes are bytes on one rank.
"""

import math
from dataclasses import dataclass

from vllm_sloguard.knobs import Config
from vllm_sloguard.machine import Machine
from vllm_sloguard.model_shape import ModelShape

GIB = 2**30
# vLLM's defaults (vllm/config/cache.py).
DEFAULT_UTILIZATION = 0.92
# What an H200 lost to neither weights nor activations in eight starts of different dtype, batch and quantization:
# 0.38 to 0.40 GiB (CUDA context and libraries after the snapshot, allocator rounding, input buffers).
_CUDA_OVERHEAD = int(0.39 * GIB)
# The resident size of a CPU worker with a model of next to no weights: 0.68 GiB.
_CPU_OVERHEAD = int(0.68 * GIB)
# DeepSeek's fp8_ds_mla row: 512 values, their scales, and the rope part in bf16 (vllm/v1/kv_cache_interface.py).
_FP8_DS_MLA_ROW = 656
_DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Budget:
    """Where one rank's memory goes. ``starts`` is a verdict on memory alone; ``reason`` says why, in numbers."""

    weights_bytes: int
    activation_bytes: int
    graph_bytes: int
    overhead_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    requested_bytes: int
    starts: bool
    reason: str

    @property
    def fixed_bytes(self) -> int:
        """Everything but the KV cache."""
        return self.weights_bytes + self.activation_bytes + self.graph_bytes + self.overhead_bytes


def estimate(shape: ModelShape, args: Config, machine: Machine, correction_bytes: int = 0) -> Budget:
    """The budget of ``args`` (EngineArgs names; absent means vLLM's default) for a model on a machine.

    ``correction_bytes``: what earlier starts took beyond the estimate (``learned``), counted as overhead.
    Values must have their own types and lie in their ranges; ``repair`` sees to it. Within 0.5% of the KV tokens that
    vLLM reported for ordinary decoders; an upper bound of the bytes a token takes where ``shape.hybrid``.
    """
    weights = weights_bytes(shape, args)
    activation = activation_bytes(shape, args, machine)
    # Measured: 0.26 with and without graphs differ by less than its noise of 24 MiB in this estimate, so none.
    graphs = 0
    overhead = (_CUDA_OVERHEAD if machine.kind == "cuda" else _CPU_OVERHEAD) + correction_bytes
    fixed = weights + activation + graphs + overhead
    requested = requested_bytes(args, machine)
    explicit = explicit_kv_bytes(args)
    kv = explicit if explicit is not None else requested - fixed
    per_token = kv_bytes_per_token(shape, args)
    block = block_size(shape, args, machine)
    tokens = max(0, kv) // (per_token * block) * block
    problem = _problem(fixed, kv, requested, machine, explicit=explicit is not None)
    need = request_tokens(shape, args, machine)
    if not problem and need is not None and tokens < need:
        problem = f"one request of the longest length needs {need} KV tokens, {tokens} fit"
    return Budget(
        weights_bytes=weights,
        activation_bytes=activation,
        graph_bytes=graphs,
        overhead_bytes=overhead,
        kv_bytes=kv,
        kv_bytes_per_token=per_token,
        kv_tokens=tokens,
        requested_bytes=requested,
        starts=not problem,
        reason=problem or f"{tokens} KV tokens in {kv / GIB:.2f} GiB",
    )


def _problem(fixed: int, kv: int, requested: int, machine: Machine, *, explicit: bool) -> str:
    free = machine.free_bytes
    # CUDA checks the share even where kv_cache_memory_bytes replaces it (gpu_worker.py, request_memory); the CPU
    # backend does not (cpu_worker.py of 0.32).
    if requested > free and not (explicit and machine.kind == "cpu"):
        return f"requested {requested / GIB:.2f} GiB exceed the {free / GIB:.2f} GiB that are free"
    if kv <= 0:
        return f"weights and activations take {fixed / GIB:.2f} of {requested / GIB:.2f} GiB: none is left for KV"
    if fixed + kv > free:
        return f"{fixed / GIB:.2f} GiB and {kv / GIB:.2f} GiB of KV exceed the {free / GIB:.2f} GiB that are free"
    return ""


def requested_bytes(args: Config, machine: Machine) -> int:
    """What vLLM claims of the device: ceil(total * gpu_memory_utilization) (worker/utils.py, request_memory)."""
    return math.ceil(machine.total_bytes * float(args.get("gpu_memory_utilization", DEFAULT_UTILIZATION)))


def explicit_kv_bytes(args: Config) -> int | None:
    """kv_cache_memory_bytes, None where vLLM sizes the cache itself."""
    value = args.get("kv_cache_memory_bytes")
    return int(value) if value is not None else None


def weights_bytes(shape: ModelShape, args: Config) -> int:
    """Parameters of one rank. Quantization narrows the linear layers, not embeddings and head.

    Checked: 2.875 GiB for Qwen2-1.5B's shape; vLLM's own figure of 3.02 counts buffers that are overhead here.
    """
    if shape.stated_weights_bytes is not None:
        return shape.stated_weights_bytes
    tp, pp = _int(args, "tensor_parallel_size", 1), _int(args, "pipeline_parallel_size", 1)
    wide = dtype_bytes(shape, args)
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied_embeddings else 2) * wide
    layers = math.ceil(shape.layers / pp)
    dense = min(layers, shape.dense_layers) if shape.experts else layers
    linear = layers * _attention_parameters(shape, tp) + dense * _mlp(shape, shape.intermediate) // tp
    linear += (layers - dense) * _expert_parameters(shape) // tp
    return int(linear * _linear_bytes(shape, args, wide)) + embeddings // tp


def _attention_parameters(shape: ModelShape, tp: int) -> int:
    heads = shape.heads // tp
    if shape.mla:
        query = heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
        into_query = shape.q_lora_rank * (shape.hidden + query) if shape.q_lora_rank else shape.hidden * query
        latent = shape.hidden * (shape.kv_lora_rank + shape.qk_rope_head_dim)
        out_of_latent = shape.kv_lora_rank * heads * (shape.qk_nope_head_dim + shape.v_head_dim)
        return into_query + latent + out_of_latent + heads * shape.v_head_dim * shape.hidden
    kv_heads = max(1, shape.kv_heads // tp)
    return shape.hidden * shape.head_dim * (2 * heads + 2 * kv_heads)


def _mlp(shape: ModelShape, width: int) -> int:
    return (3 if shape.gated_mlp else 2) * shape.hidden * width


def _expert_parameters(shape: ModelShape) -> int:
    routed = shape.experts * _mlp(shape, shape.expert_intermediate)
    return routed + _mlp(shape, shape.shared_expert_intermediate) + shape.hidden * shape.experts


def _linear_bytes(shape: ModelShape, args: Config, wide: int) -> float:
    if shape.quantized_bits is not None:
        return shape.quantized_bits / 8
    # Of the methods that quantize an ordinary checkpoint while loading it, all current ones go to 8 bits.
    return 1.0 if "fp8" in str(args.get("quantization", "")) else float(wide)


def activation_bytes(shape: ModelShape, args: Config, machine: Machine) -> int:
    """The peak of one forward pass over ``max_num_batched_tokens``.

    At its widest an MLP holds the gate and up projections, their product, the hidden state and its residual before and
    after. Matches the H200 at 8192, 32768 and 131072 tokens, and float32, within 0.02 GiB; at 4096 tokens vLLM took
    0.19 GiB more.
    """
    tp = _int(args, "tensor_parallel_size", 1)
    widest = shape.intermediate
    if shape.experts:
        widest = max(widest if shape.dense_layers else 0, shape.experts_per_token * shape.expert_intermediate)
    mlp = (3 if shape.gated_mlp else 2) * widest // tp
    return batched_tokens(args, machine) * (mlp + 4 * shape.hidden) * dtype_bytes(shape, args)


def batched_tokens(args: Config, machine: Machine | None) -> int:
    """max_num_batched_tokens, or the API server's default for the machine (arg_utils.py, get_batch_defaults)."""
    stated = args.get("max_num_batched_tokens")
    if stated is not None:
        return int(stated)
    if machine is None:
        return 2048
    if machine.kind == "cpu":
        return 2048 * _int(args, "tensor_parallel_size", 1) * _int(args, "pipeline_parallel_size", 1)
    if machine.total_bytes >= 160 * GIB:
        return 16384
    return 8192 if machine.total_bytes >= 70 * GIB and "a100" not in machine.source.lower() else 2048


def kv_bytes_per_token(shape: ModelShape, args: Config) -> int:
    """Bytes of one token in all layers of a rank.

    Attention keeps a key and a value for each of max(1, kv_heads / TP) heads; MLA keeps one latent vector, which TP
    does not divide.
    """
    layers = math.ceil(shape.layers / _int(args, "pipeline_parallel_size", 1))
    kind = str(args.get("kv_cache_dtype", "auto"))
    if shape.stated_kv_bytes_per_token is not None:
        return shape.stated_kv_bytes_per_token // (2 if kind.startswith("fp8") else 1)
    if shape.mla and kind == "fp8_ds_mla":
        return layers * _FP8_DS_MLA_ROW
    element = 1 if kind.startswith("fp8") else _DTYPE_BYTES.get(kind, dtype_bytes(shape, args))
    if shape.mla:
        return layers * (shape.kv_lora_rank + shape.qk_rope_head_dim) * element
    kv_heads = max(1, shape.kv_heads // _int(args, "tensor_parallel_size", 1))
    return layers * 2 * kv_heads * shape.head_dim * element


def request_tokens(shape: ModelShape, args: Config, machine: Machine) -> int | None:
    """KV tokens that vLLM wants before it starts with max_model_len; None where it fits the length itself (-1).

    Whole blocks of one longest request, and the null block that 0.32 keeps back (kv_cache_utils.py,
    get_kv_cache_configs). With a window in every layer a request keeps at most window - 1 tokens and those in flight,
    in one more block.
    """
    length = max_model_len(shape, args)
    if length is None:
        return None
    block = block_size(shape, args, machine)
    if shape.sliding_window is None:
        return (math.ceil(length / block) + 1) * block
    held = min(shape.sliding_window - 1 + batched_tokens(args, machine), length)
    return (math.ceil(held / block) + 2) * block


def max_model_len(shape: ModelShape | None, args: Config) -> int | None:
    """The longest request, tokens; None where it is unknown or left to vLLM (-1)."""
    stated = args.get("max_model_len")
    if stated is not None:
        return None if stated == -1 else int(stated)
    return shape.max_model_len if shape is not None else None


def block_size(shape: ModelShape, args: Config, machine: Machine) -> int:
    """Tokens of one KV block: as stated, else 16, on the CPU 128 (platforms/cpu.py; 16 for MLA there)."""
    stated = args.get("block_size")
    if stated is not None:
        return int(stated)
    return 128 if machine.kind == "cpu" and not shape.mla else 16


def dtype_bytes(shape: ModelShape, args: Config) -> int:
    """Width of weights and activations; with "auto" vLLM halves a float32 model (config/model.py)."""
    return _DTYPE_BYTES.get(str(args.get("dtype", "auto")), min(2, shape.dtype_bytes))


def _int(args: Config, name: str, default: int) -> int:
    return int(args.get(name, default))
