"""The width of a quantized checkpoint's weights, from the ``quantization_config`` in its config.json."""

from dataclasses import dataclass
from typing import cast

from vllm_sloguard.guard.config_json import Fields, name, nested, positive, wrong

# Microscaling 4-bit floats: an 8-bit scale per 32 values in MXFP4, per 16 in NVFP4.
_MXFP4_BITS, _NVFP4_BITS = 4 + 8 / 32, 4 + 8 / 16
# bitsandbytes stores a float32 per 64 weights; vLLM's loader undoes the double quantization.
_BNB4_BITS = 4 + 32 / 64
_USUAL_BITS = {"gptq": 4, "awq": 4, "auto-round": 4}


@dataclass(frozen=True)
class Quantization:
    """``bits`` per weight of the linear layers, including scales and zero points; embeddings and head are unquantized.

    ``experts_only``: only experts are quantized. ``fp8_kv``: the checkpoint requests an 8-bit KV cache, which is then
    vLLM's default. ``exact`` is false if some linear layers are unquantized and only the checkpoint tells which.
    Experts' matrices are rounded up to multiples of ``rounding``. ``narrows_inputs``: inputs of linear layers are
    quantized too, with scales computed at run time.
    """

    bits: float
    experts_only: bool = False
    fp8_kv: bool = False
    exact: bool = True
    rounding: int = 1
    narrows_inputs: bool = False


# gpt-oss quantizes only its experts (quantization/mxfp4.py); most kernels need multiples of 128 (oracle/mxfp4.py).
_MXFP4 = Quantization(_MXFP4_BITS, experts_only=True, rounding=128)


def of_checkpoint(config: Fields, text: Fields) -> Quantization | None:
    """The quantization of a checkpoint; None if there is none or its method is unknown, when weights count in full.

    Raises:
        ValueError: a field is invalid.
    """
    found = nested(config, "quantization_config") or nested(text, "quantization_config")
    if found is None:
        return None
    method = name(found, "quant_method").lower().replace("_", "-")
    if method == "compressed-tensors":
        return _compressed_tensors(found)
    if method.startswith("modelopt"):
        return _modelopt(found)
    return _MXFP4 if "mxfp4" in method else _stated_bits(found, method)


def _stated_bits(found: Fields, method: str) -> Quantization | None:
    if method in ("bitsandbytes", "bnb"):
        return Quantization(_BNB4_BITS if found.get("load_in_4bit") is True else 8)
    bits = positive(found, "bits") or positive(found, "w_bit") or _USUAL_BITS.get(method)
    if bits is None:
        dynamic = found.get("activation_scheme", "dynamic") == "dynamic"
        return Quantization(8, narrows_inputs=dynamic) if "fp8" in method else None
    if bits > 16:
        raise wrong("quantization_config.bits", "at most 16", bits)
    return Quantization(_grouped(bits, found.get("group_size", found.get("q_group_size")), zero_points=True))


def _grouped(bits: int, group: object, *, zero_points: bool) -> float:
    """A group of weights shares a 16-bit scale and usually a zero point of the weights' width.

    -1 and null mean one group per row, with negligible scales.
    """
    if group is None or group == -1:
        return float(bits)
    if isinstance(group, bool) or not isinstance(group, int) or not 1 <= group <= 2**20:
        raise wrong("quantization_config group_size", "a positive whole number or -1", group)
    return bits + (16 + (bits if zero_points else 0)) / group


def _compressed_tensors(found: Fields) -> Quantization | None:
    """The widest of its ``config_groups`` (compressed_tensors.py; 8 bits of KV where it has a scheme for that)."""
    widths: list[float] = []
    for group in (nested(found, "config_groups") or {}).values():
        weights = nested(cast("Fields", group), "weights") if isinstance(group, dict) else None
        if weights is None:
            continue
        bits = positive(weights, "num_bits") or 8
        if bits > 16:
            raise wrong("quantization_config num_bits", "at most 16", bits)
        if name(weights, "type") == "float" and bits == 4:
            widths.append(_NVFP4_BITS)
        else:
            zero_points = weights.get("symmetric") is False
            widths.append(_grouped(bits, weights.get("group_size"), zero_points=zero_points))
    kv = nested(found, "kv_cache_scheme")
    exact = len(set(widths)) == 1 and _NVFP4_BITS not in widths
    return Quantization(max(widths), fp8_kv=kv is not None, exact=exact) if widths else None


def _modelopt(found: Fields) -> Quantization:
    inner = nested(found, "quantization") or found
    algorithm = (name(inner, "quant_algo") or name(found, "quant_method")).lower()
    kv = inner.get("kv_cache_quant_algo") or inner.get("kv_cache_scheme")
    fp8_kv = "fp8" in str(kv).lower() or (isinstance(kv, dict) and cast("Fields", kv).get("num_bits") == 8)
    narrow = "fp4" in algorithm
    return Quantization(_NVFP4_BITS if narrow else 8, fp8_kv=fp8_kv, exact=not narrow)


def while_loading(method: str) -> Quantization | None:
    """The effect of the ``quantization`` argument on an unquantized checkpoint; None if unknown."""
    if "bitsandbytes" in method:
        return Quantization(_BNB4_BITS)
    if "experts_int8" in method:
        return Quantization(8, experts_only=True)
    # All other methods for unquantized checkpoints use 8 bits.
    return Quantization(8, narrows_inputs=True) if "fp8" in method else None
