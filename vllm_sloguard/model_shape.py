"""What a model's config.json says about its size: the input of the memory arithmetic."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

# Names of one and the same field in different model families.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "multi_query_group_num", "num_kv_heads"),
    "intermediate": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim"),
    "experts": ("n_routed_experts", "num_local_experts", "num_experts"),
}
# The keys from which vLLM derives the longest request (model_arch_config_convertor.py, derive_max_model_len_and_key):
# the smallest of them holds.
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
_DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
# Families whose MLP has two matrices; all others gate it and have three.
_UNGATED = frozenset(
    {"gpt2", "opt", "gpt_neox", "gptj", "bloom", "mpt", "falcon", "phi", "starcoder2", "gpt_bigcode", "nemotron"}
)
# Families that alternate windows and full attention without always writing ``layer_types``.
_ALTERNATING = frozenset({"gemma2", "gemma3", "gemma3_text", "cohere2", "gpt_oss"})
_ATTENTION_LAYERS = frozenset({"full_attention", "attention"})


@dataclass(frozen=True)
class ModelShape:
    """A decoder model's sizes. Lengths are tokens, widths are elements.

    ``sliding_window`` is set where every layer has that window; ``hybrid`` where layers differ (windows in some, state
    space or linear attention), which makes plain KV arithmetic an upper bound. ``max_model_len`` is the longest request
    that vLLM derives from the configuration, None where it says nothing. ``quantized_bits`` is the width of a
    checkpoint's own linear weights, None where they are stored in ``dtype_bytes``. The two ``stated`` sizes replace the
    arithmetic where they are known and the architecture is not: see ``stated``.
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
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    qk_nope_head_dim: int = 0
    q_lora_rank: int = 0
    v_head_dim: int = 0
    sliding_window: int | None = None
    hybrid: bool = False
    dtype_bytes: int = 2
    quantized_bits: int | None = None
    max_position_embeddings: int | None = None
    max_model_len: int | None = None
    stated_weights_bytes: int | None = None
    stated_kv_bytes_per_token: int | None = None

    @property
    def mla(self) -> bool:
        """Whether attention keeps one latent vector a token instead of keys and values."""
        return self.kv_lora_rank > 0


# Bytes of activations a token over parameters, by memory.activation_bytes: Qwen2-1.5B (66 kB), Llama-3.1-8B (119) and
# 70B (238) lie within a tenth.
_ACTIVATION_REFERENCE, _ACTIVATION_EXPONENT = (1.54e9, 66_048), 0.34


def stated(weights_bytes: int, kv_bytes_per_token: int, max_model_len: int | None = None) -> ModelShape:
    """A model of which only these sizes are known: one layer, whose width gives what decoders of its weight activate.

    Weights are taken to be 16 bits wide; both sizes are those of one rank.
    """
    parameters, activation = _ACTIVATION_REFERENCE
    wide = activation * (max(weights_bytes, 1) / 2 / parameters) ** _ACTIVATION_EXPONENT / 2
    # memory.activation_bytes counts the MLP's width three times, the hidden one four times; 5.8 is their usual ratio.
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


def read(model_dir: Path) -> ModelShape:
    """The shape of the model in ``model_dir``.

    Raises:
        ValueError: config.json is missing, is no JSON object, or lacks a field.
    """
    path = model_dir / "config.json"
    try:
        loaded: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: a JSON object was expected")  # noqa: TRY004 - one kind of error for a bad file
    return from_config(cast("dict[str, Any]", loaded))


def of_model(model: str) -> ModelShape | None:
    """The shape of a model in a local folder; None for one that is not. Raises ValueError for a bad config.json."""
    folder = Path(model)
    return read(folder) if (folder / "config.json").is_file() else None


def from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes; a multimodal one is judged by its ``text_config``.

    Raises:
        ValueError: a field is missing, has a wrong type, or does not fit the others.
    """
    text = _text_config(config)
    hidden, heads = _required(text, "hidden"), _required(text, "heads")
    # GPT-2 leaves its MLP's width out and means four times the hidden size.
    intermediate = _first(text, _ALIASES["intermediate"]) or 4 * hidden
    head_dim = _positive(text, "head_dim")
    if head_dim is None and hidden % heads:
        raise ValueError(f"model config: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return ModelShape(
        layers=_required(text, "layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(text, heads),
        head_dim=head_dim or hidden // heads,
        intermediate=intermediate,
        vocab=_required(text, "vocab_size"),
        tied_embeddings=_tied(config, text),
        gated_mlp=text.get("model_type") not in _UNGATED,
        kv_lora_rank=_number(text, "kv_lora_rank"),
        qk_rope_head_dim=_number(text, "qk_rope_head_dim"),
        qk_nope_head_dim=_number(text, "qk_nope_head_dim"),
        q_lora_rank=_number(text, "q_lora_rank"),
        v_head_dim=_number(text, "v_head_dim"),
        sliding_window=_sliding_window(text),
        hybrid=_hybrid(text),
        dtype_bytes=_dtype_bytes(config, text),
        quantized_bits=_quantized_bits(config, text),
        max_position_embeddings=_positive(text, "max_position_embeddings"),
        max_model_len=_max_model_len(text),
        **_experts(text, intermediate),
    )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return cast("Mapping[str, Any]", nested) if isinstance(nested, Mapping) else config


def _positive(text: Mapping[str, Any], key: str) -> int | None:
    """A positive whole number; None where the key is absent or null."""
    value: object = text.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"model config: {key} must be a positive whole number, got {value!r}")
    return value


def _number(text: Mapping[str, Any], key: str) -> int:
    """A whole number from 0 on; 0 where the key is absent or null."""
    return 0 if text.get(key) == 0 else (_positive(text, key) or 0)


def _first(text: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((value for key in keys if (value := _positive(text, key)) is not None), None)


def _required(text: Mapping[str, Any], name: str) -> int:
    keys = _ALIASES.get(name, (name,))
    value = _first(text, keys)
    if value is None:
        raise ValueError(f"model config: {keys[0]} is missing")
    return value


def _kv_heads(text: Mapping[str, Any], heads: int) -> int:
    if text.get("model_type") == "falcon" and text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    return _first(text, _ALIASES["kv_heads"]) or heads


def _tied(config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    # Transformers 4 tied unless told otherwise, and model families overrode it; all current ones write it down.
    return bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


def _experts(text: Mapping[str, Any], intermediate: int) -> dict[str, int]:
    experts = next((n for key in _ALIASES["experts"] if (n := _number(text, key))), 0)
    if not experts:
        return {}
    width = _positive(text, "moe_intermediate_size") or intermediate
    shared = _number(text, "shared_expert_intermediate_size") or width * _number(text, "n_shared_experts")
    return {
        "experts": experts,
        "experts_per_token": _number(text, "num_experts_per_tok") or 1,
        "expert_intermediate": width,
        "shared_expert_intermediate": shared,
        "dense_layers": _number(text, "first_k_dense_replace"),
    }


def _sliding_window(text: Mapping[str, Any]) -> int | None:
    """The window that all layers share. Qwen2 writes a window down and switches it off beside it."""
    if text.get("use_sliding_window") is False or _hybrid(text) or "full_attention" in _layer_types(text):
        return None
    return _number(text, "sliding_window") or None


def _hybrid(text: Mapping[str, Any]) -> bool:
    kinds = set(_layer_types(text))
    return (
        len(kinds) > 1
        or text.get("model_type") in _ALTERNATING
        or bool(kinds - _ATTENTION_LAYERS - {"sliding_attention"})
        or any(
            text.get(key) for key in ("mamba_d_state", "ssm_state_size", "linear_num_value_heads", "layers_block_type")
        )
        or bool(text.get("sliding_window_pattern"))
    )


def _layer_types(text: Mapping[str, Any]) -> tuple[str, ...]:
    kinds: object = text.get("layer_types")
    return tuple(str(kind) for kind in cast("list[object]", kinds)) if isinstance(kinds, list) else ()


def _dtype_bytes(config: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    for source in (text, config):
        name: object = source.get("dtype") or source.get("torch_dtype")
        if name is not None:
            known = _DTYPE_BYTES.get(str(name).removeprefix("torch."))
            if known is None:
                raise ValueError(f"model config: torch_dtype {name!r} is not one of {sorted(_DTYPE_BYTES)}")
            return known
    # Nothing written means float32 to Transformers, which vLLM halves.
    return 2


def _quantized_bits(config: Mapping[str, Any], text: Mapping[str, Any]) -> int | None:
    found: object = config.get("quantization_config") or text.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    quantization = cast("Mapping[str, Any]", found)
    bits: object = quantization.get("bits") or quantization.get("w_bit")
    if isinstance(bits, int) and not isinstance(bits, bool):
        return bits
    method = str(quantization.get("quant_method", ""))
    return 8 if "fp8" in method else 4 if "fp4" in method else None


def _max_model_len(text: Mapping[str, Any]) -> int | None:
    """The longest request that vLLM accepts for this model, tokens."""
    stated = _positive(text, "model_max_length")
    if stated is not None:
        return stated
    lengths = [length for key in _LENGTH_KEYS if (length := _positive(text, key)) is not None]
    return int(min(lengths) * _rope_factor(text)) if lengths else None


def _rope_factor(text: Mapping[str, Any]) -> float:
    found: object = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(found, Mapping) or "gemma3" in str(text.get("model_type")):
        return 1.0
    rope = cast("Mapping[str, Any]", found)
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    factor: object = rope.get("factor")
    scales = kind not in _ROPE_ALREADY_SCALED and isinstance(factor, int | float) and not isinstance(factor, bool)
    return float(cast("float", factor)) if scales else 1.0
