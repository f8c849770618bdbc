"""Finds the highest request rate that meets the SLO in few loads: doubling until it fails, then bisection.

Pure: the next rate follows from the loads measured so far.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Rates this close cannot be told apart by a load of a few hundred requests.
TOLERANCE = 1.1


@dataclass(frozen=True)
class RateResult:
    """A load at ``rate`` requests per second, and whether it met the SLO."""

    rate: float
    met: bool


def next_rate(tried: Sequence[RateResult], base: float, highest: float) -> float | None:
    """The next rate to try, in requests per second; None once the capacity is known.

    The first is ``base``, which a configuration must meet to be feasible; no rate exceeds ``highest``.
    """
    if not tried:
        return base
    met, missed = capacity(tried), _lowest_missed(tried)
    if met is None:
        return None
    if missed is None:
        return None if met >= highest else min(2 * met, highest)
    return None if missed / met <= TOLERANCE else math.sqrt(met * missed)


def capacity(tried: Sequence[RateResult]) -> float | None:
    """The highest rate that met the SLO, with none below it that missed; None if the first rate missed it."""
    missed = _lowest_missed(tried)
    met = [t.rate for t in tried if t.met and (missed is None or t.rate < missed)]
    return max(met, default=None)


def _lowest_missed(tried: Sequence[RateResult]) -> float | None:
    return min((t.rate for t in tried if not t.met), default=None)
