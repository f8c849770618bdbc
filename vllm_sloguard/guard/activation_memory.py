"""What vLLM's profile run measures besides weights: activations, sampler state, CUDA graphs. Bytes per rank."""

from collections.abc import Mapping

from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.model_shape import ModelShape
from vllm_sloguard.guard.vllm_defaults import capture_sizes, dtype_bytes, sequences, step_tokens, tensor_parallel
from vllm_sloguard.guard.weights import embedding_bytes
from vllm_sloguard.knobs import KnobValues

MinorVersion = tuple[int, int]
# The version on which the constants of this package were measured.
MEASURED: MinorVersion = (0, 26)
# From these versions on, vLLM subtracts the sampler's state (worker/gpu_worker.py measures the whole process) and
# reserves a block, and measures its CUDA graphs (worker/gpu/cudagraph_utils.py) with model runner V2.
COUNTS_STATE, COUNTS_GRAPHS = (0, 27), (0, 29)
# Hidden states per token alive at the peak, besides the MLP's: for measured families, and for others.
HIDDEN_STATES: Mapping[str, int] = {"llama": 3, "mistral": 3, "gemma2": 5}
_MOST_HIDDEN_STATES = 4
# Families whose profile run was measured: on an H200 within 0.08 GiB.
MEASURED_ACTIVATIONS = frozenset({*HIDDEN_STATES, "qwen2", "qwen3", "phi3"})
# Per logit: 16-bit and 32-bit values, sorted values, their 64-bit indices, probabilities and cumulative sums.
_SAMPLING_ELEMENT = 2 + 4 + 4 + 8 + 4 + 4
# Each CUDA graph is counted as at least this much (worker/gpu/cudagraph_utils.py, _MIN_PER_GRAPH_BYTES).
_GRAPH = 2**20


def activation_bytes(shape: ModelShape, args: KnobValues, machine: Machine) -> int:
    """The peak of the profile run: one step over a full batch of tokens, then logits for max_num_seqs of them.

    On an H200 (0.26) within 0.03 GiB for Qwen2-1.5B, Llama-3.1-8B, Mistral-7B and Qwen2.5-32B, eager, at 1024 to 131072
    tokens, and within 0.07 for Gemma-2-9B, which holds its logits twice to cap them. Model runner V2 takes no more than
    the logits, as dummy requests set no sampling options (worker/gpu/sample/sampler.py); the CPU's converts them to
    float32. Compilation copies the input embeddings once: 0.43 GiB measured with Qwen2-1.5B, 1.01 with Llama-3.1-8B.
    """
    tokens = step_tokens(shape, args, machine)
    wide = dtype_bytes(shape, args)
    step = tokens * _elements_a_token(shape, tensor_parallel(args)) * wide
    rows = min(sequences(args, machine), tokens)
    logits = rows * shape.vocab * (wide if machine.kind == "cuda" else wide + 4) * (2 if shape.logit_softcap else 1)
    compiled = machine.kind == "cuda" and not args.get("enforce_eager")
    copied = embedding_bytes(shape, args) if compiled else 0
    return max(step, logits + 2 * tokens * shape.hidden * wide, copied)


def sampling_bytes(shape: ModelShape, args: KnobValues, machine: Machine, version: MinorVersion) -> int:
    """The peak if the profile run also samples, with top-k and top-p, for max_num_seqs requests.

    Model runner V1 does (gpu_model_runner.py, _dummy_sampler_run), V2 does not; which one runs depends on the features
    in use. 0.26 did not when measured; KV caches reported by other versions, at 256 and 1024 sequences, match sampling.
    """
    if machine.kind == "cpu" or version == MEASURED:
        return 0
    tokens = step_tokens(shape, args, machine)
    rows = min(sequences(args, machine), tokens)
    return rows * shape.vocab * _SAMPLING_ELEMENT + 2 * tokens * shape.hidden * dtype_bytes(shape, args)


def _elements_a_token(shape: ModelShape, tp: int) -> int:
    """At its peak an MLP holds the gate and up projections, their product, the hidden state and its residual before
    and after, one less or more in some families; with experts, once per expert a token is routed to (fused_moe.py).
    """
    widest = shape.intermediate if shape.dense_layers or shape.expert_step > 1 or not shape.experts else 0
    if shape.experts:
        routed = shape.experts_per_token * shape.expert_intermediate
        widest = max(widest, routed, shape.shared_expert_intermediate)
    states = HIDDEN_STATES.get(shape.model_type, _MOST_HIDDEN_STATES)
    return (3 if shape.gated_mlp else 2) * widest // tp + states * shape.hidden


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
    graphs = len(sizes) + sum(size <= sequences(args, machine) for size in sizes)
    pool = sizes[-1] * _elements_a_token(shape, tensor_parallel(args)) * dtype_bytes(shape, args)
    return pool + graphs * _GRAPH
