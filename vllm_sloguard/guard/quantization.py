"""How wide a quantized checkpoint's weights are, from the ``quantization_config`` of its config.json."""

from dataclasses import dataclass
from typing import cast

from vllm_sloguard.guard.config_json import Fields, name, nested, positive, wrong

# 4-bit floats of microscaling: 32 share a scale of 8 bits in MXFP4, 16 in NVFP4.
_MXFP4_BITS, _NVFP4_BITS = 4 + 8 / 32, 4 + 8 / 16
# bitsandbytes keeps a float32 for each 64 weights; vLLM undoes the second quantization (loader of bitsandbytes).
_BNB4_BITS = 4 + 32 / 64
_USUAL_BITS = {"gptq": 4, "awq": 4, "auto-round": 4}


@dataclass(frozen=True)
class Quantization:
    """``bits`` a weight of the linear layers, their scales and zero points included; embeddings and head stay wide.

    ``experts_only`` where all but the experts stays wide, too. ``fp8_kv`` where the checkpoint asks for a KV cache of
    8 bits, which vLLM then takes by default. ``exact`` is unset where parts of the linear layers stay wide that are
    known from the checkpoint alone. Experts' matrices are rounded up to multiples of ``rounding``.
    """

    bits: float
    experts_only: bool = False
    fp8_kv: bool = False
    exact: bool = True
    rounding: int = 1


# gpt-oss has its experts alone in it (quantization/mxfp4.py); most kernels want multiples of 128 (oracle/mxfp4.py).
_MXFP4 = Quantization(_MXFP4_BITS, experts_only=True, rounding=128)


def of_checkpoint(config: Fields, text: Fields) -> Quantization | None:
    """The quantization of a checkpoint; None for none, and for methods unknown here, whose weights count in full.

    Raises:
        ValueError: a field is not what it should be.
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
        return Quantization(8) if "fp8" in method else None
    if bits > 16:
        raise wrong("quantization_config.bits", "at most 16", bits)
    return Quantization(_grouped(bits, found.get("group_size", found.get("q_group_size")), zero_points=True))


def _grouped(bits: int, group: object, *, zero_points: bool) -> float:
    """A group of weights shares a scale of 16 bits and mostly a zero point of their own width.

    -1 and null mean groups as long as a row: no scale to speak of.
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
    """What the ``quantization`` argument does to an ordinary checkpoint as it is loaded; None for nothing known."""
    if "bitsandbytes" in method:
        return Quantization(_BNB4_BITS)
    if "experts_int8" in method:
        return Quantization(8, experts_only=True)
    # All other methods that need no quantized checkpoint go to 8 bits.
    return Quantization(8) if "fp8" in method else None
