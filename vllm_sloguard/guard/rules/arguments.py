"""The arguments that rules check, and how vLLM parses their values.

vLLM's configuration classes use pydantic in lax mode (vllm/config/utils.py, 0.32): True, 8.0 and "8" all pass as
integers. Rules judge the parsed value; the original is left as it is.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from vllm_sloguard.guard import memory
from vllm_sloguard.knobs import KnobValues, Value


class ArgumentKind(StrEnum):
    """The type of an argument, as worded in errors."""

    INT = "a whole number"
    FLOAT = "a number"
    BOOL = "true or false"
    TEXT = "a text"


@dataclass(frozen=True)
class Argument:
    """``lowest`` is the minimum of an integer. ``default`` is set if EngineArgs does not accept None."""

    kind: ArgumentKind
    lowest: int = 0
    default: Value | None = None


ARGUMENTS: Mapping[str, Argument] = {
    "max_num_seqs": Argument(ArgumentKind.INT, 1),
    "max_num_batched_tokens": Argument(ArgumentKind.INT, 1),
    "max_model_len": Argument(ArgumentKind.INT, -1),
    "block_size": Argument(ArgumentKind.INT, 1),
    "kv_cache_memory_bytes": Argument(ArgumentKind.INT, 1),
    "long_prefill_token_threshold": Argument(ArgumentKind.INT, 0, 0),
    "stream_interval": Argument(ArgumentKind.INT, 1, 1),
    "tensor_parallel_size": Argument(ArgumentKind.INT, 1, 1),
    "pipeline_parallel_size": Argument(ArgumentKind.INT, 1, 1),
    "gpu_memory_utilization": Argument(ArgumentKind.FLOAT, default=memory.DEFAULT_UTILIZATION),
    "enforce_eager": Argument(ArgumentKind.BOOL, default=False),
    "enable_chunked_prefill": Argument(ArgumentKind.BOOL),
    "enable_prefix_caching": Argument(ArgumentKind.BOOL),
    "kv_cache_dtype": Argument(ArgumentKind.TEXT, default="auto"),
    "dtype": Argument(ArgumentKind.TEXT, default="auto"),
    "quantization": Argument(ArgumentKind.TEXT),
}

# Other arguments of vLLM that could be mistaken for a misspelling of one of the above.
_SPELT_ALIKE = frozenset(
    {
        "dbo_prefill_token_threshold",
        "device_memory_utilization",
        "long_prefill_token_threshold_adaptive",
        "max_num_scheduled_tokens",
    }
)
_ALIKE = 0.8
_WHOLE = re.compile(r"[+-]?\d+(_\d+)*(\.0+)?", re.ASCII)
# Python and pydantic parse no longer string as an integer.
_MAX_DIGITS = 4300
_TRUE = frozenset({"1", "on", "t", "true", "y", "yes"})
_FALSE = frozenset({"0", "off", "f", "false", "n", "no"})


def misspelt(names: Iterable[str]) -> dict[str, str]:
    """Names that look like a misspelling of one of ARGUMENTS, each with its likely correction.

    ARGUMENTS does not list all of vLLM's arguments, so this is a guess: a newer vLLM may have the name.
    """
    found: dict[str, str] = {}
    for name in names:
        if name not in ARGUMENTS and name not in _SPELT_ALIKE:
            near = difflib.get_close_matches(name[:80], ARGUMENTS, n=1, cutoff=_ALIKE)
            if near:
                found[name] = near[0]
    return found


def typed_arguments(args: KnobValues) -> dict[str, Value]:
    """The arguments as vLLM parses them, without unreadable ones; those that no rule checks are unchanged."""
    found: dict[str, Value] = {}
    for name, value in args.items():
        read = value if name not in ARGUMENTS else reading(name, value)
        if read is not None:
            found[name] = read
    return found


def reading(name: str, value: object) -> Value | None:
    """``value`` as vLLM parses it for the argument ``name``; None if it rejects the type."""
    match ARGUMENTS[name].kind:
        case ArgumentKind.INT:
            return _whole(value)
        case ArgumentKind.FLOAT:
            return _number(value)
        case ArgumentKind.BOOL:
            return _boolean(value)
        case ArgumentKind.TEXT:
            return value if isinstance(value, str) else None


def _whole(value: object) -> int | None:
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        # Beyond 64 bits, pydantic accepts integers only as int.
        return int(value) if math.isfinite(value) and value.is_integer() and abs(value) < 2**63 else None
    if not isinstance(value, str) or len(value) > _MAX_DIGITS:
        return None
    text = value.strip()
    return int(text.partition(".")[0]) if _WHOLE.fullmatch(text) else None


def _number(value: object) -> float | None:
    if not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def _boolean(value: object) -> bool | None:
    if isinstance(value, str):
        text = value.lower()
        return True if text in _TRUE else False if text in _FALSE else None
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    return None


def display(value: object) -> str:
    """``value`` for a message: one short line, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    try:
        text = repr(value)
    except ValueError:  # a number with too many digits inside
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
