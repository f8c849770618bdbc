"""A model's dimensions from its config.json: the input of the memory estimate."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from vllm_sloguard.guard import attention_windows, quantization
from vllm_sloguard.guard.bounded_read import read_small_file
from vllm_sloguard.guard.config_json import Fields, first, flag, largest, name, nested, positive, required, whole, wrong
from vllm_sloguard.guard.quantization import Quantization

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
# Names of the same field in different model families.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "multi_query_group_num", "num_kv_heads"),
    "intermediate": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "decoder_ffn_dim"),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "experts": ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    "experts_per_token": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "moe_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "moe_k",
        "top_k_experts",
    ),
    "shared_experts": ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts", "num_shared_expert"),
}
_EXPERT_STEPS = ("decoder_sparse_step", "moe_layer_freq", "moe_layer_interval", "interleave_moe_layer_step")
# Where multimodal models have the configuration of their language model.
_TEXT_CONFIGS = ("text_config", "language_config", "llm_config")
# Defaults of fields that a family's config.json may omit (its configuration class in transformers).
_FAMILY_DEFAULTS: Mapping[str, Fields] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    "gemma3_text": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
}
# The keys from which vLLM derives the longest request (model_arch_config_convertor.py, derive_max_model_len_and_key):
# the smallest one counts.
_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# With these the length in the configuration is already the scaled one (vllm/config/model.py, _get_and_verify_max_len).
_ROPE_ALREADY_SCALED = frozenset(
    {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "default"}
)
_MAX_SCALING = 2**20
# Families whose MLP has two matrices; all others have a gated MLP with three.
_UNGATED = frozenset(
    {"arcee", "gpt2", "opt", "gpt_neox", "gptj", "bloom", "mpt", "falcon", "phi", "starcoder2", "gpt_bigcode"}
    | {"nemotron"}
)
# Families whose embeddings are tied by default (their configuration classes in transformers 5).
_TIED = frozenset(
    {"gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "opt", "bloom", "mpt", "falcon", "starcoder2", "gpt_bigcode"}
    | {"cohere", "cohere2", "smollm3"}
)
# Families for which the formulas give vLLM's weights within 1% and its KV cache exactly; tests/real_vllm compares each
# with vLLM's own classes.
EXACT_FAMILIES = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3_text", "phi3"}
    | {"deepseek_v2", "gpt_oss"}
)


@dataclass(frozen=True)
class ModelShape:
    """A decoder model's sizes. Lengths are tokens, widths are elements.

    ``sliding_window`` is set if layers have window attention: those marked in ``windowed``, or all if that is empty.
    ``hybrid`` is set if layers have a state instead of keys and values (state space, linear or chunked attention),
    which makes the KV estimate an upper bound. Experts replace the MLP of every ``expert_step``-th layer after the
    first ``dense_layers``. ``max_model_len`` is the longest request that vLLM derives from the configuration, if any;
    ``default_model_len`` replaces it if the user sets no length. ``quantization`` is the checkpoint's own,
    None if weights are ``dtype_bytes`` wide. The two ``stated`` sizes replace the formulas if only they are known, and
    not the architecture: see ``stated``.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied_embeddings: bool = False
    gated_mlp: bool = True
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_expert_intermediate: int = 0
    dense_layers: int = 0
    expert_step: int = 1
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    qk_nope_head_dim: int = 0
    q_lora_rank: int = 0
    v_head_dim: int = 0
    sliding_window: int | None = None
    windowed: tuple[bool, ...] = ()
    hybrid: bool = False
    kv_layers: int | None = None
    dtype_bytes: int = 2
    quantization: Quantization | None = None
    max_position_embeddings: int | None = None
    max_model_len: int | None = None
    default_model_len: int | None = None
    model_type: str = ""
    logit_softcap: bool = False
    stated_weights_bytes: int | None = None
    stated_kv_bytes_per_token: int | None = None

    @property
    def ordinary(self) -> bool:
        """Whether tests show the formulas to be exact for this kind of model (benchmarks/README.md)."""
        if self.stated_weights_bytes is not None:
            return True
        plain = self.quantization is None or self.quantization.exact
        return plain and not self.hybrid and self.model_type in EXACT_FAMILIES

    @property
    def unusual(self) -> bool:
        """Whether it is more than a decoder of attention and MLPs."""
        return self.hybrid or self.mla or bool(self.experts)

    @property
    def mla(self) -> bool:
        """Whether attention caches one latent vector per token instead of keys and values."""
        return self.kv_lora_rank > 0


# Activation bytes per token as a function of parameters, by memory.activation_bytes: within 10% for Qwen2-1.5B (66 kB),
# Llama-3.1-8B (119) and 70B (238).
_ACTIVATION_REFERENCE, _ACTIVATION_EXPONENT = (1.54e9, 66_048), 0.34


def stated(weights_bytes: int, kv_bytes_per_token: int, max_model_len: int | None = None) -> ModelShape:
    """A model of which only these sizes are known: one layer, as wide as gives typical activations for the weights.

    Weights are assumed to be 16 bits wide; both sizes are per rank.
    """
    parameters, activation = _ACTIVATION_REFERENCE
    wide = activation * (max(weights_bytes, 1) / 2 / parameters) ** _ACTIVATION_EXPONENT / 2
    # memory.activation_bytes counts the MLP's width three times, the hidden size four times; 5.8 is their usual ratio.
    hidden = max(1, round(wide / (3 * 5.8 + 4)))
    return ModelShape(
        layers=1,
        hidden=hidden,
        heads=1,
        kv_heads=1,
        head_dim=hidden,
        intermediate=round(5.8 * hidden),
        vocab=1,
        max_model_len=max_model_len,
        stated_weights_bytes=weights_bytes,
        stated_kv_bytes_per_token=kv_bytes_per_token,
    )


def read_shape(model_dir: Path) -> ModelShape:
    """The shape of the model in ``model_dir``.

    Raises:
        ValueError: config.json is missing, not a JSON object, or lacks a field.
    """
    path = model_dir / "config.json"
    try:
        loaded: object = json.loads(read_small_file(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: a JSON object was expected")  # noqa: TRY004 - one kind of error for a bad file
    return from_config(cast("dict[str, Any]", loaded))


def shape_of_model(model: str) -> ModelShape | None:
    """The shape of a model in a local folder; None for one that is not. Raises ValueError for a bad config.json."""
    folder = Path(model)
    return read_shape(folder) if (folder / "config.json").is_file() else None


def beyond_arithmetic(args: Mapping[str, object]) -> bool:
    """Whether vLLM arguments change the model, or place parts of it elsewhere, in ways that a shape cannot express."""
    return any(args.get(name) for name in ("hf_overrides", "cpu_offload_gb", "speculative_config", "enable_lora"))


def from_config(config: Fields) -> ModelShape:
    """The shape described by a config.json; for a multimodal model, by its ``text_config``.

    Raises:
        ValueError: a field is missing, has a wrong type, or does not fit the others.
    """
    text = _text_config(config)
    hidden, heads = required(text, *_ALIASES["hidden"]), required(text, *_ALIASES["heads"])
    intermediate = _mlp_width(text, hidden)
    head_dim = whole(text, "head_dim") or None
    if head_dim is None and hidden % heads:
        raise ValueError(f"model config: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    layers = required(text, *_ALIASES["layers"])
    attention = attention_windows.windows_of_model(text, layers)
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(text, heads),
        head_dim=head_dim or hidden // heads,
        intermediate=intermediate,
        vocab=required(text, *_ALIASES["vocab"]),
        tied_embeddings=_tied(config, text),
        gated_mlp=name(text, "model_type") not in _UNGATED,
        kv_lora_rank=whole(text, "kv_lora_rank"),
        qk_rope_head_dim=whole(text, "qk_rope_head_dim"),
        qk_nope_head_dim=whole(text, "qk_nope_head_dim"),
        q_lora_rank=whole(text, "q_lora_rank"),
        v_head_dim=whole(text, "v_head_dim"),
        sliding_window=attention.window,
        windowed=attention.windowed,
        hybrid=attention.other,
        kv_layers=attention.kv_layers,
        dtype_bytes=_dtype_bytes(config, text),
        quantization=quantization.of_checkpoint(config, text),
        max_position_embeddings=positive(text, "max_position_embeddings"),
        max_model_len=_max_model_len(text),
        default_model_len=_default_model_len(text),
        model_type=name(text, "model_type"),
        logit_softcap=bool(text.get("final_logit_softcapping")),
        **_experts(text, intermediate, layers),
    )


def _text_config(config: Fields) -> Fields:
    text = next((found for key in _TEXT_CONFIGS if (found := nested(config, key))), config)
    return {**_FAMILY_DEFAULTS.get(name(text, "model_type"), {}), **text}


def _kv_heads(text: Fields, heads: int) -> int:
    family = name(text, "model_type")
    if (family == "gpt_bigcode" and flag(text, "multi_query") is not False) or (
        family == "falcon" and flag(text, "multi_query") and not flag(text, "new_decoder_architecture")
    ):
        return 1
    return first(text, _ALIASES["kv_heads"]) or heads


def _tied(config: Fields, text: Fields) -> bool:
    stated = [flag(fields, "tie_word_embeddings") for fields in (text, config)]
    written = next((tied for tied in stated if tied is not None), None)
    return name(text, "model_type") in _TIED if written is None else written


def _mlp_width(text: Fields, hidden: int) -> int:
    """GPT-2 omits it: four times the hidden size. LFM2 states a number from which vLLM derives it (lfm2.py)."""
    width = first(text, _ALIASES["intermediate"]) or 4 * hidden
    if not flag(text, "block_auto_adjust_ff_dim"):
        return width
    step = positive(text, "block_multiple_of") or 256
    return -(-(2 * width // 3) // step) * step


def _experts(text: Fields, intermediate: int, layers: int) -> dict[str, int]:
    experts = largest(text, _ALIASES["experts"])
    if not experts:
        return {}
    width = largest(text, ("moe_intermediate_size",)) or intermediate
    shared = whole(text, "shared_expert_intermediate_size") or width * largest(text, _ALIASES["shared_experts"])
    dense, step = _layers_without_experts(text, layers)
    return {
        "experts": experts,
        "experts_per_token": largest(text, _ALIASES["experts_per_token"]) or 1,
        "expert_intermediate": width,
        "shared_expert_intermediate": shared,
        "dense_layers": dense,
        "expert_step": step,
    }


def _layers_without_experts(text: Fields, layers: int) -> tuple[int, int]:
    """The number of dense layers before the first one with experts, and the step from one with experts to the next.

    Some families list for each layer whether it has experts; then only the number of layers with experts is exact.
    """
    listed: object = text.get("moe_layer_freq")
    if isinstance(listed, list):
        return max(0, layers - sum(bool(entry) for entry in cast("list[object]", listed))), 1
    plain: object = text.get("mlp_only_layers")
    first_with = whole(text, "first_k_dense_replace") or largest(text, ("moe_layer_start_index",))
    dense = first_with + (len(cast("list[object]", plain)) if isinstance(plain, list) else 0)
    return dense, first(text, _EXPERT_STEPS) or 1


def _dtype_bytes(config: Fields, text: Fields) -> int:
    for source in (text, config):
        stated: object = source.get("dtype") or source.get("torch_dtype")
        if stated is not None:
            known = DTYPE_BYTES.get(stated.removeprefix("torch.")) if isinstance(stated, str) else None
            if known is None:
                raise wrong("torch_dtype", f"one of {', '.join(DTYPE_BYTES)}", stated)
            return known
    # Transformers defaults to float32, which vLLM halves.
    return 2


def _max_model_len(text: Fields) -> int | None:
    """The longest request that vLLM accepts for this model, tokens."""
    stated = positive(text, "model_max_length")
    if stated is not None:
        return stated
    lengths = [length for key in _LENGTH_KEYS if (length := positive(text, key)) is not None]
    return max(1, int(min(lengths) * _rope_factor(text))) if lengths else None


def _default_model_len(text: Fields) -> int | None:
    """With LongRoPE, vLLM defaults to the original length (_get_and_verify_max_len)."""
    rope = _rope(text)
    return positive(text, "original_max_position_embeddings") if rope and _rope_kind(rope) == "longrope" else None


def _rope(text: Fields) -> Fields | None:
    return nested(text, "rope_parameters") or nested(text, "rope_scaling")


def _rope_kind(rope: Fields) -> str:
    return name(rope, "rope_type") or name(rope, "type") or "default"


def _rope_factor(text: Fields) -> float:
    rope = _rope(text)
    if rope is None or "gemma3" in name(text, "model_type"):
        return 1.0
    kind = _rope_kind(rope)
    factor: object = rope.get("factor")
    if kind in _ROPE_ALREADY_SCALED or factor is None:
        return 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= _MAX_SCALING:
        raise wrong("rope_scaling.factor", f"a number above 0 and at most {_MAX_SCALING}", factor)
    return float(factor)
