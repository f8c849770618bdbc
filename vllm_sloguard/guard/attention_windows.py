"""Which layers of a model use sliding-window attention, from its config.json."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_sloguard.guard.config_json import Fields, flag, name, names, positive, whole

_FULL = frozenset({"full_attention", "attention"})
_WINDOWED = "sliding_attention"
# Families that alternate window and full attention, and the default period (their configuration classes in
# transformers).
_PATTERNS = {"gemma2": 2, "gpt_oss": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "exaone4": 4}
# Fields that exist only in models with state-space layers, linear or chunked attention.
_OTHER_ATTENTION = (
    "encoder_attention_heads",
    "full_attention_interval",
    "hybrid_override_pattern",
    "mamba_d_state",
    "ssm_state_size",
    "linear_num_value_heads",
    "layers_block_type",
    "attention_chunk_size",
)
# The first layer with a window in Qwen models (default of Qwen2Config).
_QWEN_FULL_LAYERS = 28
# One entry a layer is written down, and read again with each estimate.
_MAX_LAYERS = 10_000


@dataclass(frozen=True)
class Windows:
    """A window of ``window`` tokens in the layers marked in ``windowed`` (empty: all); None for full attention.

    ``other``: some layers cache something other than keys and values. ``kv_layers`` counts those that do cache keys and
    values; None if unknown, or if all do.
    """

    window: int | None = None
    windowed: tuple[bool, ...] = ()
    other: bool = False
    kv_layers: int | None = None


def windows_of_model(text: Fields, layers: int) -> Windows:
    """The windows of a model of ``layers`` layers.

    Raises:
        ValueError: a field has a wrong type, or does not fit the number of layers.
    """
    kinds = names(text, "layer_types")
    if kinds and len(kinds) != layers:
        raise ValueError(f"model config: layer_types has {len(kinds)} entries, num_hidden_layers is {layers}")
    other = bool(set(kinds) - _FULL - {_WINDOWED}) or any(text.get(key) for key in _OTHER_ATTENTION)
    window = whole(text, "sliding_window")
    if other or not window or not _switched_on(text):
        return Windows(other=other, kv_layers=_kv_layers(text, kinds, layers) if other else None)
    windowed = tuple(kind == _WINDOWED for kind in kinds) or _unsaid(text, layers)
    if windowed and not any(windowed):
        return Windows()
    return Windows(window, () if all(windowed) else windowed)


def _kv_layers(text: Fields, kinds: tuple[str, ...], layers: int) -> int | None:
    """How many layers of a hybrid cache keys and values, in the various notations of model families."""
    if kinds:
        return sum(kind in _FULL or kind == _WINDOWED for kind in kinds)
    blocks = names(text, "layers_block_type")
    if blocks:
        return sum(block in _FULL or block == "hybrid" for block in blocks)
    # Nemotron-H has one letter per layer: M is Mamba, * attention, - an MLP, E experts.
    if pattern := name(text, "hybrid_override_pattern"):
        return pattern.count("*")
    interval = positive(text, "full_attention_interval")
    return layers // interval if interval else None


def _switched_on(text: Fields) -> bool:
    """Qwen's config.json states a window even if it is disabled."""
    flagged = flag(text, "use_sliding_window")
    return bool(flagged) if _is_qwen(text) else flagged is not False


def _is_qwen(text: Fields) -> bool:
    return name(text, "model_type").startswith("qwen")


def _unsaid(text: Fields, layers: int) -> tuple[bool, ...]:
    """The windowed layers if ``layer_types`` is absent; empty if all have the window."""
    if _is_qwen(text):
        stated = text.get("max_window_layers")
        full = _QWEN_FULL_LAYERS if stated is None else whole(text, "max_window_layers")
        return _each(layers, lambda layer: layer >= full)
    # Every so many layers there is one with full attention.
    period = positive(text, "sliding_window_pattern") or _PATTERNS.get(name(text, "model_type"))
    return _each(layers, lambda layer: (layer + 1) % period != 0) if period else ()


def _each(layers: int, windowed: Callable[[int], bool]) -> tuple[bool, ...]:
    if layers > _MAX_LAYERS:
        raise ValueError(f"model config: num_hidden_layers must be at most {_MAX_LAYERS} here, got {layers}")
    return tuple(windowed(layer) for layer in range(layers))
