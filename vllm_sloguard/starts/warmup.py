"""When an engine is warm. Pure.

The first requests of an engine compile, capture and allocate, which must not be measured. So batches of requests are
sent before the load, each as soon as the previous one is answered. Successive batches are the same work, so their step
times differ only by what the engine still had to prepare. At the rate of the load they would differ by their random
arrivals, and never settle at a rate above the engine's capacity.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Between the medians of two batches; a batch has few first tokens, and so a rough median of them.
ITL_TOLERANCE, TTFT_TOLERANCE = 0.2, 0.5
LONGEST_WARMUP_S = 60.0  # no batch begins later
_MOST_TIMES = 4


@dataclass(frozen=True)
class Batch:
    """The answered requests of one batch: seconds to the first token of each, and between the tokens of all."""

    ttfts_s: tuple[float, ...]
    itls_s: tuple[float, ...]


def batch_size(least: int) -> int:
    """Requests in a batch, if at least ``least`` are to be sent: a comparison needs two batches."""
    return math.ceil(least / 2)


def most(least: int) -> int:
    """How many are sent at most."""
    return batch_size(least) * 2 * _MOST_TIMES


def settled(batches: Sequence[Batch]) -> bool:
    """Whether the medians of the last two batches agree, of both times."""
    if len(batches) < 2:
        return False
    before, last = batches[-2:]
    ttfts_agree = _agree(before.ttfts_s, last.ttfts_s, TTFT_TOLERANCE)
    return ttfts_agree and _agree(before.itls_s, last.itls_s, ITL_TOLERANCE)


def _agree(before: Sequence[float], last: Sequence[float], tolerance: float) -> bool:
    if not before or not last:
        # One token a request leaves nothing between tokens; a batch without any answer never settles by its TTFT.
        return not before and not last
    low, high = sorted((statistics.median(before), statistics.median(last)))
    return high <= low * (1 + tolerance)
