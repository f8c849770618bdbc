"""What vLLM's profile run finds beside weights: activations, the sampler's state, CUDA graphs. Bytes of one rank."""

from vllm_sloguard.defaults import GIB, capture_sizes, dtype_bytes, sequences, step_tokens, tensor_parallel
from vllm_sloguard.knobs import Config
from vllm_sloguard.machine import Machine
from vllm_sloguard.model_shape import ModelShape

Version = tuple[int, int]
# The version on which the constants of this package were measured.
MEASURED: Version = (0, 26)
# From these on vLLM subtracts the sampler's state (worker/gpu_worker.py takes what the process consumed as a whole),
# keeps a block back, and measures its CUDA graphs (worker/gpu/cudagraph_utils.py) with model runner V2.
COUNTS_STATE, COUNTS_GRAPHS = (0, 27), (0, 29)
# The least that a start took on a GPU: 4096 tokens, of which 0.25 GiB would be expected, took 0.43 in the one start
# that shows it. What else is alive then is not known.
_LEAST_CUDA = int(0.43 * GIB)
# Each CUDA graph is counted as at least this much (worker/gpu/cudagraph_utils.py, _MIN_PER_GRAPH_BYTES).
_GRAPH = 2**20


def activation_bytes(shape: ModelShape, args: Config, machine: Machine) -> int:
    """The peak of the profile run: one step over all tokens of a batch, then logits for max_num_seqs of them.

    Matches the H200 at 8192, 32768 and 131072 tokens, and float32, within 0.02 GiB. The sampler adds nothing to the
    logits, since dummy requests ask for nothing (worker/gpu/sample/sampler.py; the CPU's runner makes float32 of them).
    """
    tokens = step_tokens(shape, args, machine)
    wide = dtype_bytes(shape, args)
    step = tokens * _elements_a_token(shape, tensor_parallel(args)) * wide
    rows = min(sequences(args, machine), tokens)
    logits = rows * shape.vocab * (wide if machine.kind == "cuda" else wide + 4) + 2 * tokens * shape.hidden * wide
    return max(step, logits, _LEAST_CUDA if machine.kind == "cuda" else 0)


def _elements_a_token(shape: ModelShape, tp: int) -> int:
    """At its widest an MLP holds the gate and up projections, their product, the hidden state and its residual before
    and after; experts hold this for each of those that a token goes to (fused_moe.py's workspaces).
    """
    widest = shape.intermediate if shape.dense_layers or shape.expert_step > 1 or not shape.experts else 0
    if shape.experts:
        routed = shape.experts_per_token * shape.expert_intermediate
        widest = max(widest, routed, shape.shared_expert_intermediate)
    return (3 if shape.gated_mlp else 2) * widest // tp + 4 * shape.hidden


def sampler_state_bytes(shape: ModelShape, args: Config, machine: Machine) -> int:
    """Counts of tokens for penalties: a whole number of 32 bits and a bit for each sequence and word of the vocabulary.

    Every start holds them on the GPU (worker/gpu/sample/penalties.py); only newer versions subtract them.
    """
    if machine.kind == "cpu":
        return 0
    return sequences(args, machine) * 4 * (shape.vocab + -(-shape.vocab // 32))


def graph_bytes(shape: ModelShape, args: Config, machine: Machine) -> int:
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
