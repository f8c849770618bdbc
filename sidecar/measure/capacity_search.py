"""Finds the highest request rate that meets the SLO in few loads: doubling until it fails, then bisection.

Pure: the next rate follows from the loads measured so far.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# Rates this close cannot be told apart by a load of a few hundred requests.
TOLERANCE = 1.1
# A search below a missed rate is short: at most this many rates, and none below this share of it.
_MAX_LOWER, _LOWEST_SHARE = 4, 1 / 16


@dataclass(frozen=True)
class RateResult:
    """A load at ``rate`` requests per second, and whether it met the SLO.

    ``worst`` is the largest measured share of a limit: above 1 the limit was missed. None if unknown.
    """

    rate: float
    met: bool
    worst: float | None = field(default=None, compare=False)


def next_rate(tried: Sequence[RateResult], base: float, highest: float) -> float | None:
    """The next rate to try, in requests per second; None once the capacity is known.

    The first is ``base``, which a configuration must meet to be feasible; no rate exceeds ``highest``.
    """
    if not tried:
        return base
    met, missed = capacity(tried), lowest_missed(tried)
    if met is None:
        return None
    if missed is None:
        return None if met >= highest else min(2 * met, highest)
    return None if missed / met <= TOLERANCE else math.sqrt(met * missed)


def next_lower_rate(tried: Sequence[RateResult], missed: float) -> float | None:
    """The next rate to try below ``missed``, at which the SLO was missed; None once enough is known.

    Halving until the SLO is met, then bisection.
    """
    met, lowest = capacity(tried), min(missed, lowest_missed(tried) or missed)
    if len(tried) >= _MAX_LOWER:
        return None
    if met is None:
        return lowest / 2 if lowest / 2 >= missed * _LOWEST_SHARE else None
    return None if lowest / met <= TOLERANCE else math.sqrt(met * lowest)


def capacity(tried: Sequence[RateResult]) -> float | None:
    """The highest rate that met the SLO, with none below it that missed; None if the first rate missed it."""
    missed = lowest_missed(tried)
    met = [t.rate for t in tried if t.met and (missed is None or t.rate < missed)]
    return max(met, default=None)


def lowest_missed(tried: Sequence[RateResult]) -> float | None:
    """The lowest rate that missed the SLO; None if none did."""
    return min((t.rate for t in tried if not t.met), default=None)
