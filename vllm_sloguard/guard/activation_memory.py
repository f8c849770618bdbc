"""What vLLM's profile run finds beside weights: activations, the sampler's state, CUDA graphs. Bytes of one rank."""

from collections.abc import Mapping

from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.model_shape import ModelShape
from vllm_sloguard.guard.vllm_defaults import capture_sizes, dtype_bytes, sequences, step_tokens, tensor_parallel
from vllm_sloguard.guard.weights import embedding_bytes
from vllm_sloguard.knobs import KnobValues

MinorVersion = tuple[int, int]
# The version on which the constants of this package were measured.
MEASURED: MinorVersion = (0, 26)
# From these on vLLM subtracts the sampler's state (worker/gpu_worker.py takes what the process consumed as a whole),
# keeps a block back, and measures its CUDA graphs (worker/gpu/cudagraph_utils.py) with model runner V2.
COUNTS_STATE, COUNTS_GRAPHS = (0, 27), (0, 29)
# Hidden states a token that are alive at the widest point, beside the MLP's: where they were measured, and elsewhere.
HIDDEN_STATES: Mapping[str, int] = {"llama": 3, "mistral": 3, "gemma2": 5}
_MOST_HIDDEN_STATES = 4
# Families whose profile run was measured: on an H200 within 0.08 GiB.
MEASURED_ACTIVATIONS = frozenset({*HIDDEN_STATES, "qwen2", "qwen3", "phi3"})
# Logits of 16 and of 32 bits, the sorted ones, their 64-bit places, probabilities and the sums of these.
_SAMPLING_ELEMENT = 2 + 4 + 4 + 8 + 4 + 4
# Each CUDA graph is counted as at least this much (worker/gpu/cudagraph_utils.py, _MIN_PER_GRAPH_BYTES).
_GRAPH = 2**20


def activation_bytes(shape: ModelShape, args: KnobValues, machine: Machine) -> int:
    """The peak of the profile run: one step over all tokens of a batch, then logits for max_num_seqs of them.

    On an H200 (0.26) within 0.03 GiB for Qwen2-1.5B, Llama-3.1-8B, Mistral-7B and Qwen2.5-32B, eager, at 1024 to 131072
    tokens, and within 0.07 for Gemma-2-9B, which holds its logits twice to cap them. Model runner V2 adds nothing to
    the logits, as dummy requests ask for nothing (worker/gpu/sample/sampler.py); the CPU's makes float32 of them.
    Compiling copies the input embeddings once: seen as 0.43 GiB with Qwen2-1.5B and 1.01 with Llama-3.1-8B.
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
    """What the peak grows to, if the profile run samples with top-k and top-p for max_num_seqs requests.

    Model runner V1 does (gpu_model_runner.py, _dummy_sampler_run), V2 does not; which of them runs depends on the
    features in use. 0.26 was measured and did not. Reported KV caches of other versions, with 256 and with 1024
    sequences, are those with it.
    """
    if machine.kind == "cpu" or version == MEASURED:
        return 0
    tokens = step_tokens(shape, args, machine)
    rows = min(sequences(args, machine), tokens)
    return rows * shape.vocab * _SAMPLING_ELEMENT + 2 * tokens * shape.hidden * dtype_bytes(shape, args)


def _elements_a_token(shape: ModelShape, tp: int) -> int:
    """At its widest an MLP holds the gate and up projections, their product, the hidden state and its residual before
    and after, one less or more in some families; experts hold this for each that a token goes to (fused_moe.py).
    """
    widest = shape.intermediate if shape.dense_layers or shape.expert_step > 1 or not shape.experts else 0
    if shape.experts:
        routed = shape.experts_per_token * shape.expert_intermediate
        widest = max(widest, routed, shape.shared_expert_intermediate)
    states = HIDDEN_STATES.get(shape.model_type, _MOST_HIDDEN_STATES)
    return (3 if shape.gated_mlp else 2) * widest // tp + states * shape.hidden


def sampler_state_bytes(shape: ModelShape, args: KnobValues, machine: Machine) -> int:
    """Counts of tokens for penalties: a whole number of 32 bits and a bit for each sequence and word of the vocabulary.

    Every start holds them on the GPU (worker/gpu/sample/penalties.py); only newer versions subtract them.
    """
    if machine.kind == "cpu":
        return 0
    return sequences(args, machine) * 4 * (shape.vocab + -(-shape.vocab // 32))


def graph_bytes(shape: ModelShape, args: KnobValues, machine: Machine) -> int:
    """CUDA graphs, as vLLM reckons them from 0.29 on: the largest one's activations, and a MiB for each other.

    Each size is captured in pieces, and once more as a whole where it is no more than max_num_seqs (the default mode,
    FULL_AND_PIECEWISE). 0 in eager mode. Before 0.29 it subtracts nothing (0.26 with and without graphs differ by less
    than its noise of 24 MiB).
    """
    sizes = capture_sizes(args, machine)
    if not sizes:
        return 0
    graphs = len(sizes) + sum(size <= sequences(args, machine) for size in sizes)
    pool = sizes[-1] * _elements_a_token(shape, tensor_parallel(args)) * dtype_bytes(shape, args)
    return pool + graphs * _GRAPH
