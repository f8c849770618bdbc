"""Over-saturation: requests arrive faster than they are served, so that TTFT grows without bound. Pure.

All of this must hold for the requests that arrived before the first that still waits for its first token:

- the median TTFT rises from each fifth of them to the next; the first fifth is left out, because the batch is still
  filling;
- more requests wait for their first token now than when the middle one of them arrived;
- since then there were fewer first tokens than expected arrivals, by three standard deviations of a Poisson count: a
  queue may also grow because of a burst, which ends by itself;
- the line through the later half (Theil 1950, Sen 1968), with the slope at the lower end of its 99 % interval, exceeds
  one and a half times the limit by the time 98 % of the requests have arrived.

TTFTs of neighbours are correlated, so the interval is too narrow. What protects good loads is the service rate, the
rise in every fifth, the factor, and that a quarter of the requests must have begun. Unlike arithmetic, this is a
prediction.
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, takewhile

import numpy as np

from sidecar.config.slo import Slo
from sidecar.measure.partial_load import Arrival, EarlyStop, StopReason, lower_bounds
from sidecar.measure.requests import End

_PARTS = 5
_LEAST, _MIN_SHARE = 60, 0.25
_MARGIN = 1.5
_SIGMAS = 3.0
_CONFIDENCE = 0.99
_WHERE = 0.98  # of the arrivals: the rest exceeds what a p99 allows


def saturation_ending(sent: Sequence[Arrival], now_s: float, planned: int, rate: float, slo: Slo) -> EarlyStop | None:
    """The end of a saturated load of ``planned`` requests at ``rate`` per second; ``sent`` by arrival."""
    limits = [(ms, name) for name in ("ttft_p99_ms", "e2e_p99_ms") if (ms := getattr(slo, name)) is not None]
    begun = list(takewhile(lambda a: a.begun, sent))
    if not limits or len(begun) < max(_LEAST, _MIN_SHARE * planned) or any(a.failed for a in begun):
        return None
    limit_ms, name = min(limits)
    middle_s = begun[len(begun) // 2].start_s
    if not _rises(begun) or _waiting(sent, now_s) <= _waiting(sent, middle_s):
        return None
    served = sum(middle_s < a.start_s + a.ttft_s <= now_s for a in sent if a.begun)
    if served + _SIGMAS * math.sqrt(served) >= rate * (now_s - middle_s):
        return None
    ttft_ms = _foreseen_ms(begun, planned)
    if ttft_ms <= _MARGIN * limit_ms:
        return None
    why = (
        f"over-saturated: TTFT grew from {begun[len(begun) // 2].ttft_s * 1000:.0f} to "
        f"{begun[-1].ttft_s * 1000:.0f} ms in {len(begun)} of {planned} requests, and would be {ttft_ms:.0f} ms at "
        f"their end, {name} {limit_ms:g}"
    )
    # TTFT is part of E2E latency, so it bounds both.
    return EarlyStop(End.STOP, why, lower_bounds(sent, now_s, planned, {name: ttft_ms / _MARGIN}), StopReason.SATURATED)


def _rises(begun: Sequence[Arrival]) -> bool:
    edges = [len(begun) * part // _PARTS for part in range(1, _PARTS + 1)]
    medians = [statistics.median(a.ttft_s for a in begun[low:high]) for low, high in pairwise(edges)]
    return all(before < after for before, after in pairwise(medians))


def _waiting(sent: Sequence[Arrival], at_s: float) -> int:
    """How many had arrived and had no first token."""
    return sum(a.start_s <= at_s < a.start_s + a.ttft_s or (not a.begun and a.start_s <= at_s) for a in sent)


def _foreseen_ms(begun: Sequence[Arrival], planned: int) -> float:
    """A lower bound on TTFT at the share ``_WHERE`` of the arrivals, if the trend continues."""
    half = begun[len(begun) // 2 :]
    rate = (len(begun) - 1) / (begun[-1].start_s - begun[0].start_s)
    slope = lowest_slope([a.start_s for a in half], [a.ttft_s for a in half], _CONFIDENCE)
    ahead_s = max(planned * _WHERE - len(begun), 0) / rate
    middle_s = statistics.median(a.ttft_s for a in half)
    from_middle_s = begun[-1].start_s - statistics.median(a.start_s for a in half) + ahead_s
    return (middle_s + slope * from_middle_s) * 1000


def lowest_slope(x: Sequence[float], y: Sequence[float], confidence: float) -> float:
    """The lower confidence bound of the Theil-Sen slope of ``y`` over ``x``: equation 2.6 of Sen (1968).

    As ``low_slope`` of scipy.stats.theilslopes, without that package's 60 MiB.
    """
    times, values = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    apart, rise = times[:, np.newaxis] - times, values[:, np.newaxis] - values
    slopes = np.sort(rise[apart > 0] / apart[apart > 0])
    variance = (_ties(len(y)) - sum(map(_ties, Counter(x).values())) - sum(map(_ties, Counter(y).values()))) / 18
    if not slopes.size or variance < 0:
        return math.nan
    z = statistics.NormalDist().inv_cdf((1 - confidence) / 2)
    return float(slopes[max(round((len(slopes) + z * math.sqrt(variance)) / 2) - 1, 0)])


def _ties(count: int) -> int:
    return count * (count - 1) * (2 * count + 5)
