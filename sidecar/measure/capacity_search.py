"""The highest request rate that still meets the SLO, in few loads: doubled until it fails, then halved in between.

Pure: which rate comes next follows from what was tried.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two rates that are this close cannot be told apart by a load of some hundred requests.
TOLERANCE = 1.1


@dataclass(frozen=True)
class Tried:
    """A load at ``rate`` requests a second, and whether it met the SLO."""

    rate: float
    met: bool


def next_rate(tried: Sequence[Tried], base: float, highest: float) -> float | None:
    """The next rate to try, requests a second; None once the capacity is known.

    The first is ``base``, which a configuration must meet to be feasible; none goes above ``highest``.
    """
    if not tried:
        return base
    met, missed = capacity(tried), _lowest_missed(tried)
    if met is None:
        return None
    if missed is None:
        return None if met >= highest else min(2 * met, highest)
    return None if missed / met <= TOLERANCE else math.sqrt(met * missed)


def capacity(tried: Sequence[Tried]) -> float | None:
    """The highest rate that met the SLO with none below it that missed; None where the first already missed."""
    missed = _lowest_missed(tried)
    met = [t.rate for t in tried if t.met and (missed is None or t.rate < missed)]
    return max(met, default=None)


def _lowest_missed(tried: Sequence[Tried]) -> float | None:
    return min((t.rate for t in tried if not t.met), default=None)
