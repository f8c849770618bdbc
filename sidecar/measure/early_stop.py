"""When a load may end before its last request: what it has shown already decides. Pure.

Three rules, from the surest to the least sure:

1. Arithmetic, here. The SLO is missed whatever comes: even if every request that is still unknown took no time at all,
   the judge would say so. It is never wrong, since a p99 and a share of failures only grow with the times that they are
   of. A request in flight counts with its age. A p99 of inter-token times is over all tokens: those that may still come
   count as 0, and the gaps of a request count once it has ended, since those of a failed one are not judged.
2. The sequential test of sidecar.measure.sequential_test, where the number of requests is left to it (no
   ``workload.requests``). It also ends good loads: enough was seen.
3. The trend of sidecar.measure.saturation: more comes in than is served.

The baseline is left to arithmetic alone, and the starts that a promotion rests on are not watched at all: promotion
compares values of samples of one size, and a sample that was ended for what it showed is not a fair one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.config.schema import Workload
from sidecar.config.slo import Slo
from sidecar.measure import saturation, sequential_test
from sidecar.measure.partial_load import Arrival, Hopeless, arrivals, least_p99_ms, lower_bounds, rank
from sidecar.measure.requests import End, Ending, LoadProgress
from sidecar.measure.verdict import slo_limits

# How far a limit is missed is worth knowing, too, and the first requests may all have come in one burst: no load ends
# before so many were sent, or a quarter of them where that is less.
_LEAST_SENT = 30


@dataclass(frozen=True)
class Rules:
    """What is wanted of a load; a ``thorough`` one ends early by arithmetic alone."""

    slo: Slo
    workload: Workload
    confidence: float
    thorough: bool = False

    def __call__(self, progress: LoadProgress) -> Ending | None:
        """How the load is to end now, if it is."""
        sent = arrivals(progress)
        if len(sent) < min(_LEAST_SENT, progress.planned // 4):
            return None
        hopeless = surely_missed(sent, progress.now_s, progress.planned, self.slo, self.workload)
        if hopeless is not None or self.thorough:
            return hopeless
        if self.workload.requests is None:
            tested = sequential_test.sequential_ending(sent, progress.now_s, self.slo, self.confidence)
            if tested is not None:
                return tested
        return saturation.saturation_ending(sent, progress.now_s, progress.planned, self.workload.rate, self.slo)


def surely_missed(sent: Sequence[Arrival], now_s: float, planned: int, slo: Slo, workload: Workload) -> Hopeless | None:
    """Whether the SLO is missed by arithmetic, of ``planned`` requests."""
    longest = int(workload.output_tokens * (1 + workload.spread)) + 1  # tokens
    gaps = [itl for a in sent if a.ended and not a.failed for itl in a.itls_s]
    unknown = planned - sum(a.ended for a in sent)
    samples = {
        "ttft_p99_ms": ([a.ttft_s for a in sent], planned, "requests"),
        "itl_p99_ms": (gaps, len(gaps) + unknown * longest, "times between tokens"),
        "e2e_p99_ms": ([a.e2e_s for a in sent], planned, "requests"),
    }
    p99s_ms = {name: least_p99_ms(known, total) for name, (known, total, _) in samples.items()}
    failed = sum(a.failed for a in sent)
    bounds = lower_bounds(sent, now_s, planned, p99s_ms, failed)
    for limit in slo_limits(bounds, slo):
        if limit.measured is None or limit.measured <= limit.limit:
            continue
        if limit.name == "error_rate":
            why = f"{failed} of {planned} requests failed, {math.floor(planned * limit.limit)} are allowed"
        else:
            known, total, what = samples[limit.name]
            over = sum(value * 1000 > limit.limit for value in known)
            why = f"{over} of {total} {what} were over {limit.name} {limit.limit:g}, {rank(total) - 1} are allowed"
        return Hopeless(End.STOP, why, bounds)
    return None
