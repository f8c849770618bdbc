"""Fragmentation in PyTorch's CUDA allocator (c10/cuda/CUDACachingAllocator.cpp).

Tensors of at least 10 MiB get their own segment, rounded up to 2 MiB; those from 1 to 10 MiB share segments of 20 MiB,
best fit. vLLM counts whole segments, so a model with many medium-sized matrices takes more than its weights.
"""

from collections.abc import Iterable
from functools import lru_cache

_MIB = 2**20
_SMALL, _LARGE, _SHARED_SEGMENT, _ROUNDING = _MIB, 10 * _MIB, 20 * _MIB, 2 * _MIB


@lru_cache(maxsize=256)
def unused_bytes(layer: tuple[int, ...], layers: int) -> int:
    """Bytes of segments left unused by ``layers`` identical layers; ``layer`` has the matrices of one, in order."""
    unused = 0
    # The pattern repeats quickly, so further layers waste what these do on average.
    counted = min(layers, 64)
    left: list[int] = []
    for _ in range(counted):
        for size in layer:
            if size >= _LARGE:
                unused += -size % _ROUNDING
            elif size > _SMALL:
                left = _placed(left, size)
    return (unused + sum(left)) * layers // max(1, counted)


def _placed(left: Iterable[int], size: int) -> list[int]:
    """Free bytes of the shared segments after placing ``size`` bytes in the tightest fit, or in a new segment."""
    ordered = sorted(left)
    for index, room in enumerate(ordered):
        if room >= size:
            return [*ordered[:index], room - size, *ordered[index + 1 :]]
    return [*ordered, _SHARED_SEGMENT - size]
