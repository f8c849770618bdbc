"""Human-readable numbers, as accepted by vLLM's command line."""

import math
import re

from vllm_sloguard.knobs import Value

# The arguments for which it accepts 25.6k and 4G (arg_utils.py and argparse_utils.py of 0.32).
_SIZES = frozenset({"max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes"})
_SIZE = re.compile(r"(\d{1,300})([KMGT])|(\d{1,300}(?:\.\d+)?)([kmgt])", re.ASCII)


def as_number(name: str, value: Value) -> Value:
    """``value`` of argument ``name``; "8k", "4G" and "auto" are converted to numbers."""
    if name not in _SIZES or not isinstance(value, str):
        return value
    text = value.strip()
    if name == "max_model_len" and text.lower() == "auto":
        return -1
    size = _SIZE.fullmatch(text)
    if size is None:
        return value
    whole, binary, number, decimal = size.groups()
    if whole:
        return int(whole) * 1024 ** ("KMGT".index(binary) + 1)
    scaled = float(number) * 1000 ** ("kmgt".index(decimal) + 1)
    return int(scaled) if math.isfinite(scaled) else value
