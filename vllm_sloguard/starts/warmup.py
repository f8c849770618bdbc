"""Decides when an engine is warm. Pure.

An engine's first requests compile, capture and allocate, which must not be measured. So batches of requests are sent
before the load, each once the previous one has finished. All batches are the same work, so their step times differ only
by the engine's remaining preparation. At the rate of the load, they would differ by random arrivals, and never settle
at a rate above the engine's capacity.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Tolerated difference between the medians of two batches; wider for TTFT, of which a batch has few samples.
ITL_TOLERANCE, TTFT_TOLERANCE = 0.2, 0.5
LONGEST_WARMUP_S = 60.0  # no batch starts later
_MAX_TIMES = 4


@dataclass(frozen=True)
class Batch:
    """The finished requests of one batch: TTFT of each, and the gaps between tokens of all, in seconds."""

    ttfts_s: tuple[float, ...]
    itls_s: tuple[float, ...]


def batch_size(least: int) -> int:
    """Requests per batch, if at least ``least`` are to be sent: a comparison needs two batches."""
    return math.ceil(least / 2)


def most(least: int) -> int:
    """The most warm-up requests to send."""
    return batch_size(least) * 2 * _MAX_TIMES


def settled(batches: Sequence[Batch]) -> bool:
    """Whether the medians of the last two batches agree, for both TTFT and gaps."""
    if len(batches) < 2:
        return False
    before, last = batches[-2:]
    ttfts_agree = _agree(before.ttfts_s, last.ttfts_s, TTFT_TOLERANCE)
    return ttfts_agree and _agree(before.itls_s, last.itls_s, ITL_TOLERANCE)


def _agree(before: Sequence[float], last: Sequence[float], tolerance: float) -> bool:
    if not before or not last:
        # With one token per request, neither batch has gaps.
        return not before and not last
    low, high = sorted((statistics.median(before), statistics.median(last)))
    return high <= low * (1 + tolerance)
