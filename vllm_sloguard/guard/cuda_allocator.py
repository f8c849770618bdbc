"""What PyTorch's CUDA allocator takes beyond the tensors that it holds (c10/cuda/CUDACachingAllocator.cpp).

Tensors of at least 10 MiB get a segment of their own, rounded up to 2 MiB; those between 1 and 10 MiB share segments
of 20 MiB, best fit first. vLLM counts whole segments, so a model of middle-sized matrices takes more than its weights.
"""

from collections.abc import Iterable
from functools import lru_cache

_MIB = 2**20
_SMALL, _LARGE, _SHARED_SEGMENT, _ROUNDING = _MIB, 10 * _MIB, 20 * _MIB, 2 * _MIB


@lru_cache(maxsize=256)
def unused_bytes(layer: tuple[int, ...], layers: int) -> int:
    """Bytes of segments that the matrices of ``layers`` equal layers leave unused; ``layer`` are one's, in order."""
    unused = 0
    # The pattern repeats soon; what is beyond these layers wastes as they do on average.
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
    """What is left of the shared segments once ``size`` bytes have gone into the tightest one, or into a new one."""
    ordered = sorted(left)
    for index, room in enumerate(ordered):
        if room >= size:
            return [*ordered[:index], room - size, *ordered[index + 1 :]]
    return [*ordered, _SHARED_SEGMENT - size]
