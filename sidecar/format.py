"""How times, sizes and arguments read: the same in the terminal, in the report and on the page. Pure."""

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import cast

# Says one line to the operator: the terminal, or the log.
Say = Callable[[str], None]
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def when(at: float) -> str:
    """Seconds since the epoch as local date and time, with the zone: "2026-11-22 18:48:03 UTC"."""
    return f"{datetime.fromtimestamp(at).astimezone():%Y-%m-%d %H:%M:%S %Z}"


def size(count: float) -> str:
    """Bytes: "512 MiB"."""
    power = min(int(math.log2(count)) // 10, len(_UNITS) - 1) if count >= 1 else 0
    return f"{count / 2 ** (10 * power):.4g} {_UNITS[power]}"


def setting(given: object, name: str = "") -> str:
    """A value of the argument ``name``; None where it is not set."""
    if given is None:
        return "not set"
    if isinstance(given, bool):
        return "on" if given else "off"
    if isinstance(given, list):
        return ",".join(setting(one) for one in cast("list[object]", given))
    if name.endswith("_bytes") and isinstance(given, int | float) and 2**20 <= given < 2**63:
        return size(given)
    return f"{given:.4g}" if isinstance(given, float) else str(given)


def assignments(args: Mapping[str, object], names: Iterable[str] | None = None) -> str:
    """ "max_num_seqs=8 kv_cache_memory_bytes=64 MiB", of ``names`` alone where they are given."""
    return " ".join(
        f"{name}={setting(args[name], name)}" for name in (args if names is None else names) if name in args
    )


def change(name: str, before: object, after: object) -> str:
    """ "max_num_seqs 64 → 8"."""
    return f"{name} {setting(before, name)} → {setting(after, name)}"
