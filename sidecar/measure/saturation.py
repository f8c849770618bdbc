"""Over-saturation: more requests come in than are served, so that the time to the first token grows without end. Pure.

All of this must hold, of the requests that arrived before the first that still waits for its first token:

- the median of their times to the first token is higher in each fifth of them than in the one before; the first fifth
  is left out, in which the batch fills;
- more wait for their first token now than when the middle one of them arrived;
- since then fewer first tokens came than the rate of the load promises arrivals, by three standard deviations of a
  Poisson count: a queue may also grow because more arrived than usual, and that ends by itself;
- the line through the later half, by the method of Theil (1950) and Sen (1968) and with the slope at the low end of its
  99 % interval, leads to more than one and a half times the limit where 98 % of the requests will have arrived.

Times of neighbours depend on each other, so that the interval is narrower than it should be: what is served, the rise
in every part and the factor are what guards good loads, and that a quarter of the requests must have begun. This
is a prediction, unlike arithmetic.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Any

from sidecar.config.slo import Slo
from sidecar.measure.partial_load import Arrival, EarlyStop, StopReason, lower_bounds
from sidecar.measure.requests import End

_PARTS = 5
_LEAST, _LEAST_SHARE = 60, 0.25
_MARGIN = 1.5
_SIGMAS = 3.0
_CONFIDENCE = 0.99
_WHERE = 0.98  # of the arrivals: what comes after it is more than a p99 allows


def saturation_ending(sent: Sequence[Arrival], now_s: float, planned: int, rate: float, slo: Slo) -> EarlyStop | None:
    """The end of a load of ``planned`` requests, ``rate`` a second, that runs away; ``sent`` by arrival."""
    limits = [(ms, name) for name in ("ttft_p99_ms", "e2e_p99_ms") if (ms := getattr(slo, name)) is not None]
    begun = list(takewhile(lambda a: a.begun, sent))
    if not limits or len(begun) < max(_LEAST, _LEAST_SHARE * planned) or any(a.failed for a in begun):
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
        f"over-saturated: the time to the first token grew from {begun[len(begun) // 2].ttft_s * 1000:.0f} to "
        f"{begun[-1].ttft_s * 1000:.0f} ms in {len(begun)} of {planned} requests, and would be {ttft_ms:.0f} ms at "
        f"their end, {name} {limit_ms:g}"
    )
    # The time to the first token is part of the whole: it is a bound for either.
    return EarlyStop(End.STOP, why, lower_bounds(sent, now_s, planned, {name: ttft_ms / _MARGIN}), StopReason.SATURATED)


def _rises(begun: Sequence[Arrival]) -> bool:
    edges = [len(begun) * part // _PARTS for part in range(1, _PARTS + 1)]
    medians = [statistics.median(a.ttft_s for a in begun[low:high]) for low, high in pairwise(edges)]
    return all(before < after for before, after in pairwise(medians))


def _waiting(sent: Sequence[Arrival], at_s: float) -> int:
    """How many had arrived and had no first token."""
    return sum(a.start_s <= at_s < a.start_s + a.ttft_s or (not a.begun and a.start_s <= at_s) for a in sent)


def _foreseen_ms(begun: Sequence[Arrival], planned: int) -> float:
    """At least the time to the first token at the place ``_WHERE`` of the arrivals, if it goes on as it does."""
    # Imported here: it takes longer than all else that the sidecar imports.
    from scipy.stats import theilslopes  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    half = begun[len(begun) // 2 :]
    rate = (len(begun) - 1) / (begun[-1].start_s - begun[0].start_s)
    line: Any = theilslopes([a.ttft_s for a in half], [a.start_s for a in half], alpha=_CONFIDENCE)
    ahead_s = max(planned * _WHERE - len(begun), 0) / rate
    middle_s = statistics.median(a.ttft_s for a in half)
    from_middle_s = begun[-1].start_s - statistics.median(a.start_s for a in half) + ahead_s
    return (middle_s + float(line.low_slope) * from_middle_s) * 1000
