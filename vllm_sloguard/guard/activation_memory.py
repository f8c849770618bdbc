"""What vLLM's profile run measures besides weights: activations, sampler state, CUDA graphs. Bytes per rank."""

from collections.abc import Mapping

from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.model_shape import ModelShape
from vllm_sloguard.guard.vllm_defaults import (
    block_size,
    capture_sizes,
    dtype_bytes,
    max_model_len,
    sequences,
    step_tokens,
    tensor_parallel,
)
from vllm_sloguard.guard.weights import embedding_bytes, quantization_of
from vllm_sloguard.knobs import KnobValues

MinorVersion = tuple[int, int]
# The version on which the constants of this package were measured.
MEASURED: MinorVersion = (0, 26)
# From these versions on, vLLM subtracts the sampler's state (worker/gpu_worker.py measures the whole process) and
# reserves a block, and measures its CUDA graphs (worker/gpu/cudagraph_utils.py) with model runner V2.
COUNTS_STATE, COUNTS_GRAPHS = (0, 27), (0, 29)
# Hidden states per token alive at the peak, besides the MLP's: for measured families, and for others.
HIDDEN_STATES: Mapping[str, int] = {"llama": 3, "mistral": 3, "gemma2": 5, "olmo2": 7}
_MAX_HIDDEN_STATES = 4
# Beside the workspace of the experts: of OLMoE and Mixtral on an H200 9 to 10, of DeepSeek-V2-Lite 6 to 9.
_HIDDEN_STATES_OF_EXPERTS = 9
# Per logit: 16-bit and 32-bit values, probabilities and random numbers; 0.26 filters them in place.
_SAMPLING_ELEMENT = 2 + 4 + 4 + 4
# Others also sort them: sorted values, their 64-bit indices and cumulative sums.
_SORTING_ELEMENT = 2 + 4 + 4 + 8 + 4 + 4
_HIDDEN_STATES_WHILE_SAMPLING = 4
# With 0.26 the families with experts whose profile run does not sample (DEFAULT_V2_MODEL_RUNNER_ARCHITECTURES).
_RUNNER_V2_FAMILIES = frozenset({"deepseek_v2", "granitemoe", "qwen2_moe", "longcat_flash"})
# Most tokens of earlier context that MLA projects at once (mla_attention.py, determine_chunked_prefill_workspace_size).
_MLA_CONTEXT_TOKENS = 64 * 1024
# Each CUDA graph is counted as at least this much (worker/gpu/cudagraph_utils.py, _MIN_PER_GRAPH_BYTES).
_GRAPH = 2**20


def activation_bytes(shape: ModelShape, args: KnobValues, machine: Machine) -> int:
    """The peak of the profile run: one step over a full batch of tokens, then logits for max_num_seqs of them.

    On an H200 (0.26) within 0.03 GiB for Qwen2-1.5B, Llama-3.1-8B, Mistral-7B and Qwen2.5-32B, eager, at 1024 to 131072
    tokens, within 0.07 for Gemma-2-9B, which holds its logits twice to cap them, and within 0.1 for four models with
    experts. Model runner V2 takes no more than the logits, as dummy requests set no sampling options
    (worker/gpu/sample/sampler.py); the CPU's converts them to float32. Compilation copies the input embeddings once:
    0.43 GiB measured with Qwen2-1.5B, 1.01 with Llama-3.1-8B.
    """
    tokens = step_tokens(shape, args, machine)
    wide = dtype_bytes(shape, args)
    step = tokens * _bytes_a_token(shape, args)
    if shape.mla and machine.kind == "cuda":
        step += _mla_context_bytes(shape, args, machine)
    rows = min(sequences(args, machine), tokens)
    logits = rows * shape.vocab * (wide if machine.kind == "cuda" else wide + 4) * (2 if shape.logit_softcap else 1)
    compiled = machine.kind == "cuda" and not args.get("enforce_eager")
    copied = embedding_bytes(shape, args) if compiled else 0
    return max(step, logits + 2 * tokens * shape.hidden * wide, copied)


def sampling_bytes(shape: ModelShape, args: KnobValues, machine: Machine, version: MinorVersion) -> int:
    """The peak if the profile run also samples, with top-k and top-p, for max_num_seqs requests.

    Model runner V1 does (gpu_model_runner.py, _dummy_sampler_run), V2 does not. 0.26 runs V1 for hybrids and most
    models with experts (config/vllm.py, use_v2_model_runner): on an H200 within 0.04 GiB for Qwen3-30B-A3B and
    Granite-4.0-H-Tiny. For other versions it is assumed, as KV caches that they reported, at 256 and 1024 sequences,
    match it.
    """
    if machine.kind == "cpu" or (version == MEASURED and not _samples_in_profile_run(shape)):
        return 0
    tokens, wide = step_tokens(shape, args, machine), dtype_bytes(shape, args)
    rows = min(sequences(args, machine), tokens)
    if version != MEASURED:
        return rows * shape.vocab * _SORTING_ELEMENT + 2 * tokens * shape.hidden * wide
    # The workspace of the experts is kept.
    beside = _workspace_elements(shape, tensor_parallel(args)) + _HIDDEN_STATES_WHILE_SAMPLING * shape.hidden
    return rows * shape.vocab * _SAMPLING_ELEMENT + tokens * beside * wide


def _samples_in_profile_run(shape: ModelShape) -> bool:
    return shape.hybrid or bool(shape.experts and shape.model_type not in _RUNNER_V2_FAMILIES)


def _bytes_a_token(shape: ModelShape, args: KnobValues) -> int:
    """Weights of 8 bits with scales computed at run time also need the MLP's input in 8 bits."""
    tp = tensor_parallel(args)
    narrow = quantization_of(shape, args)
    inputs = shape.intermediate // tp if narrow is not None and narrow.narrows_inputs else 0
    return _elements_a_token(shape, tp) * dtype_bytes(shape, args) + inputs


def _mla_context_bytes(shape: ModelShape, args: KnobValues, machine: Machine) -> int:
    """The keys and values of earlier context, which the profile run allocates at their largest (mla_attention.py)."""
    least = 4 * sequences(args, machine) * block_size(shape, args, machine)
    tokens = min(_MLA_CONTEXT_TOKENS, max(8 * (max_model_len(shape, args) or _MLA_CONTEXT_TOKENS), least))
    heads = max(1, shape.heads // tensor_parallel(args))
    return tokens * heads * (shape.qk_nope_head_dim + shape.v_head_dim) * dtype_bytes(shape, args)


def _elements_a_token(shape: ModelShape, tp: int) -> int:
    """At its peak an MLP holds the gate and up projections, their product, the hidden state and its residual before
    and after, one less or more in some families; experts have a workspace.
    """
    states = HIDDEN_STATES.get(shape.model_type, _MAX_HIDDEN_STATES)
    widest = shape.intermediate if shape.dense_layers or shape.expert_step > 1 or not shape.experts else 0
    widest = max(widest, shape.shared_expert_intermediate)
    dense = (3 if shape.gated_mlp else 2) * widest // tp + states * shape.hidden
    if not shape.experts:
        return dense
    return max(dense, _workspace_elements(shape, tp) + _HIDDEN_STATES_OF_EXPERTS * shape.hidden)


def _workspace_elements(shape: ModelShape, tp: int) -> int:
    """For each expert that a token is routed to: the widest of its inputs and outputs (fused_moe, workspace_shapes)."""
    if not shape.experts:
        return 0
    width = shape.expert_intermediate // tp
    projected = (2 if shape.gated_mlp else 1) * width
    return shape.experts_per_token * (max(width, shape.hidden) + max(projected, shape.hidden))


def sampler_state_bytes(shape: ModelShape, args: KnobValues, machine: Machine) -> int:
    """Token counts for penalties: a 32-bit integer and one bit per sequence and vocabulary entry.

    Always allocated on the GPU (worker/gpu/sample/penalties.py); only newer versions subtract it.
    """
    if machine.kind == "cpu":
        return 0
    return sequences(args, machine) * 4 * (shape.vocab + -(-shape.vocab // 32))


def graph_bytes(shape: ModelShape, args: KnobValues, machine: Machine) -> int:
    """CUDA graphs as estimated by vLLM since 0.29: the activations of the largest, and a MiB for each of the others.

    Each size is captured piecewise, and also as a full graph up to max_num_seqs (default mode FULL_AND_PIECEWISE). 0 in
    eager mode. Before 0.29 nothing is subtracted (0.26 with and without graphs: the difference is below its noise,
    24 MiB).
    """
    sizes = capture_sizes(args, machine)
    if not sizes:
        return 0
    most = sequences(args, machine)
    graphs = len(sizes) + sum(size <= most for size in sizes)
    pool = sizes[-1] * _elements_a_token(shape, tensor_parallel(args)) * dtype_bytes(shape, args)
    return pool + graphs * _GRAPH
