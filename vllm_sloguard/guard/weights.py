"""The parameters of one rank, from the shape of the model.

Within 1% of the models that vLLM 0.32 builds (tests/real_vllm/test_kv_specs_on_vllm.py); biases and norms are ignored.
Sizes are bytes; a stage is the range of layers of one pipeline rank.
"""

from vllm_sloguard.guard import quantization
from vllm_sloguard.guard.model_shape import ModelShape
from vllm_sloguard.guard.quantization import Quantization
from vllm_sloguard.guard.vllm_defaults import dtype_bytes, pipeline_parallel, tensor_parallel
from vllm_sloguard.knobs import KnobValues

# VocabParallelEmbedding pads the vocabulary to a multiple of this before it divides it.
_VOCAB_UNIT = 64


def stages(shape: ModelShape, args: KnobValues) -> tuple[range, ...]:
    """The layers of each pipeline stage; if there are very many stages, only of the first, a fullest and the last.

    Remaining layers go to the stages before the last (distributed/utils.py, get_pp_indices). Every stage has layers,
    as vLLM would not start otherwise.
    """
    count = min(pipeline_parallel(args), shape.layers)
    each, left = divmod(shape.layers, count)

    def start(stage: int) -> int:
        # The stages before the last have one more each.
        return stage * each + max(0, min(stage, count - 1) - (count - 1 - left))

    few = range(count) if count <= 64 else (0, count - 2, count - 1)
    return tuple(range(start(stage), start(stage + 1)) for stage in few)


def weights_bytes(shape: ModelShape, args: KnobValues, stage: range | None = None) -> int:
    """Parameters of a rank of ``stage``; by default, of the heaviest stage.

    The first stage has the input embeddings, the last the output embeddings. Tied embeddings are a single matrix if
    both are the same stage, and two copies otherwise. Quantization applies to linear layers, not to embeddings, head
    and router. Checked on a GPU: 2.875 GiB for Qwen2-1.5B's shape; vLLM's figure of 3.02 includes buffers that count
    as overhead here.
    """
    if shape.stated_weights_bytes is not None:
        return shape.stated_weights_bytes
    if stage is None:
        return max(weights_bytes(shape, args, each) for each in stages(shape, args))
    tp, wide = tensor_parallel(args), dtype_bytes(shape, args)
    layers = len(stage)
    sparse = _layers_with_experts(shape, stage)
    attention = layers * _attention_parameters(shape, tp)
    mlp = (layers - sparse) * (_mlp(shape, shape.intermediate) // tp)
    mlp += sparse * (_mlp(shape, shape.shared_expert_intermediate) // tp)
    narrow = quantization_of(shape, args)
    experts = sparse * (shape.experts * _expert(shape, narrow) // tp)
    linear = int(_width(narrow, wide, experts=False) * (attention + mlp) + _width(narrow, wide, experts=True) * experts)
    routers = sparse * shape.hidden * shape.experts * wide
    return linear + routers + _embeddings(shape, stage) * embedding_bytes(shape, args)


def shares_of_checkpoint(checkpoint: int, stage_weights: list[int], args: KnobValues) -> list[int]:
    """The weights of each stage's rank for a checkpoint of ``checkpoint`` bytes.

    Divided among the stages in proportion to the formulas, whose relative error is about the same for all ranks.
    """
    tp, total = tensor_parallel(args), sum(stage_weights)
    return [checkpoint * weights // max(1, total * tp) for weights in stage_weights]


def largest_tensors(shape: ModelShape, args: KnobValues) -> tuple[int, ...]:
    """Bytes of one layer's matrices as vLLM fuses them: query, key and value; output; gate and up; down.

    None for architectures with other matrices: MLA, experts, or unknown ones.
    """
    if shape.mla or shape.experts or shape.stated_weights_bytes is not None:
        return ()
    tp = tensor_parallel(args)
    narrow = quantization_of(shape, args)
    width = _width(narrow, dtype_bytes(shape, args), experts=False)
    heads, kv_heads = shape.heads // tp, max(1, shape.kv_heads // tp)
    rows = (shape.head_dim * (heads + 2 * kv_heads), shape.head_dim * heads)
    wide = shape.intermediate // tp
    return tuple(int(n * shape.hidden * width) for n in (*rows, (2 if shape.gated_mlp else 1) * wide, wide))


def quantization_of(shape: ModelShape, args: KnobValues) -> Quantization | None:
    """The checkpoint's own quantization, or the one while it is loaded."""
    return shape.quantization or quantization.while_loading(str(args.get("quantization", "")))


def _width(narrow: Quantization | None, wide: int, *, experts: bool) -> float:
    return float(wide) if narrow is None or (narrow.experts_only and not experts) else narrow.bits / 8


def embedding_bytes(shape: ModelShape, args: KnobValues) -> int:
    """One rank's part of the matrix of input or output embeddings (vocab_parallel_embedding.py)."""
    vocab = -(-shape.vocab // _VOCAB_UNIT) * _VOCAB_UNIT
    return -(-vocab // tensor_parallel(args)) * shape.hidden * dtype_bytes(shape, args)


def _embeddings(shape: ModelShape, stage: range) -> int:
    first, last = stage.start == 0, stage.stop == shape.layers
    if shape.experts and not shape.mla:
        # Mixtral, Qwen's MoE models and gpt-oss build both in every stage.
        first = last = True
    return 1 if first and last and shape.tied_embeddings else int(first) + int(last)


def _layers_with_experts(shape: ModelShape, stage: range) -> int:
    if not shape.experts:
        return 0
    return (stage.stop - max(stage.start, min(shape.dense_layers, stage.stop))) // shape.expert_step


def _attention_parameters(shape: ModelShape, tp: int) -> int:
    """One layer's. TP divides heads; if there are fewer KV heads than ranks, they are replicated (QKVParallelLinear).

    MLA (mla_attention.py): the projections into the latent vectors are whole on each rank.
    """
    heads = shape.heads // tp
    if shape.mla:
        query = heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
        into_query = shape.q_lora_rank * (shape.hidden + query) if shape.q_lora_rank else shape.hidden * query
        latent = shape.hidden * (shape.kv_lora_rank + shape.qk_rope_head_dim)
        out_of_latent = shape.kv_lora_rank * heads * (shape.qk_nope_head_dim + shape.v_head_dim)
        return into_query + latent + out_of_latent + heads * shape.v_head_dim * shape.hidden
    kv_heads = max(1, shape.kv_heads // tp)
    return shape.hidden * shape.head_dim * (2 * heads + 2 * kv_heads)


def _expert(shape: ModelShape, narrow: Quantization | None) -> int:
    unit = narrow.rounding if narrow is not None else 1
    hidden, width = (-(-size // unit) * unit for size in (shape.hidden, shape.expert_intermediate))
    return (3 if shape.gated_mlp else 2) * hidden * width


def _mlp(shape: ModelShape, width: int) -> int:
    return (3 if shape.gated_mlp else 2) * shape.hidden * width
