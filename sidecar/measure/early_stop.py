"""When a load of the search may end before its last request. Pure.

The rules, from certain to least certain:

1. Arithmetic. The SLO is missed whatever happens: even if every unknown request took no time at all. This is never
   wrong, because a percentile and a share only grow with their values. A request in flight counts with its age. For
   percentiles of ITL, future gaps count as 0, and the gaps of a request count once it has ended, because those of a
   failed request are not judged. Limits on means are left to rule 4.
2. The sequential test of sidecar.measure.sequential_test, if the number of requests is not fixed (no
   ``workload.requests``). It also ends good loads once they have shown enough.
3. The trend of sidecar.measure.saturation: requests arrive faster than they are served.
4. The estimated result misses a limit by more than its uncertainty.
5. A comparison: the load will not beat the best configuration, or is unlikely to both beat it and meet the SLO.
   Requests are compared in pairs, because every trial sends the same ones. A load that surely beats it and meets the
   SLO ends too, while enough trials are left to measure the configuration again, to the end.

How soon a load ends depends on what the search needs. Until a configuration has met the SLO, the search has only the
violations to go by, so a load that misses the SLO (1 to 4) runs on until its estimated result can be ranked among the
others. After that it ends at once. Every early stop carries the estimated result (sidecar.measure.load_estimate).

For the baseline only arithmetic applies, and the restarts behind a promotion always run to the end: a promotion
compares samples of equal size, and a sample truncated because of its content is biased.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sidecar.config.schema import Workload
from sidecar.config.slo import ERROR_RATE, MISS_RATE, LatencyKind, LatencyLimit, Slo
from sidecar.measure import saturation, sequential_test
from sidecar.measure.least_results import least_percentiles_ms, misses_already, sample_of
from sidecar.measure.load_estimate import RunningLoad, estimate_load, mean_ratio
from sidecar.measure.measurement import Measurement
from sidecar.measure.partial_load import (
    Arrival,
    EarlyStop,
    Finished,
    LimitEstimate,
    LoadEstimate,
    StopReason,
    arrivals,
    lower_bounds,
)
from sidecar.measure.requests import End, Ending, LoadProgress
from sidecar.measure.verdict import slo_limits

# The first requests may arrive in one burst: no load ends before this many were sent, or a quarter of them if fewer.
_MIN_SENT = 30
# An estimate can be ranked once its standard deviation is this small, absolutely or relative to how far the limit is
# missed; at the latest after this share of the requests.
_RANKED_SD, _RANKED_SHARE, _RANKED_SENT = 0.2, 0.25, 0.6
# A comparison needs this share of the requests to have ended, and at least this many; the required significance, in
# standard errors of the ratio, falls as the load progresses.
_COMPARED_SHARE, _MIN_COMPARED = 0.12, 15
_EARLY_DOUBT, _LATE_DOUBT = 0.8, 0.0
_BETTER_SHARE = 0.35  # of the requests must have ended before a load is stopped because it is better
# A much better load runs to its end: its ratio to the best changes in the course of the load, and it is the reference
# for the loads to come.
_ALIKE = 0.25
_NO_DOUBT = 2.5  # standard deviations by which an estimate must miss or meet a limit, or be better
_MISSES_SIGMAS = 3.0  # required of the misses in excess of those that the limit allows
_MIN_HOPE = 0.15  # probability of meeting the SLO and being better
_NO_GAIN = 0.01  # relative; a smaller gain is not worth finishing the load


@dataclass(frozen=True)
class SearchNeeds:
    """What the search knows before a load: whether a configuration has met the SLO, and the best one.

    ``best`` is the number of its trial, 0 if there is none, and ``best_e2e_s`` the E2E latencies of its requests by
    arrival; empty if the objective is not the mean latency. Loads that were stopped because they were better may have
    raised the bar: ``bar`` is the log ratio of their best estimated mean to that of ``best``, 0 or less, and ``bar_sd``
    its standard deviation. ``may_repeat``: enough trials are left to measure a promising configuration again.
    """

    feasible_known: bool = True
    best: int = 0
    best_e2e_s: tuple[float, ...] = ()
    bar: float = 0.0
    bar_sd: float = 0.0
    may_repeat: bool = False


NO_NEEDS = SearchNeeds()


@dataclass(frozen=True)
class Rules:
    """The stop rules of one load; a ``thorough`` one is stopped early by arithmetic only."""

    slo: Slo
    workload: Workload
    confidence: float
    thorough: bool = False
    needs: SearchNeeds = NO_NEEDS
    _finished: Finished = field(default_factory=Finished, init=False, repr=False, compare=False)

    def __call__(self, progress: LoadProgress) -> Ending | None:
        """How the load should end now, if at all."""
        sent = arrivals(progress, self._finished)
        if len(sent) < min(_MIN_SENT, progress.planned // 4):
            return None
        ending = self._verdict(sent, progress)
        if isinstance(ending, EarlyStop):
            estimate = self._estimate(sent, progress)
            if not self.needs.feasible_known and not can_be_ranked(estimate):
                return None
            return replace(ending, estimate=estimate)
        if ending is None and not self.thorough:
            return self._expected_to_miss(sent, progress) or self._compared(sent, progress)
        return ending

    def _verdict(self, sent: Sequence[Arrival], progress: LoadProgress) -> Ending | None:
        """The ending required by the SLO alone."""
        missed = surely_missed(sent, progress.now_s, progress.planned, self.slo, self.workload)
        if missed is not None or self.thorough:
            return missed
        if self.workload.requests is None:
            tested = sequential_test.sequential_ending(sent, progress.now_s, self.slo, self.confidence)
            if tested is not None:
                return tested
        return saturation.saturation_ending(sent, progress.now_s, progress.planned, self.workload.rate, self.slo)

    def _estimate(self, sent: Sequence[Arrival], progress: LoadProgress) -> LoadEstimate | None:
        load = RunningLoad(sent, progress.now_s, progress.planned, self.workload.rate)
        return estimate_load(load, self.slo, self.needs.best_e2e_s)

    def _expected_to_miss(self, sent: Sequence[Arrival], progress: LoadProgress) -> EarlyStop | None:
        """Ends a load whose estimate clearly misses a limit, although arithmetic cannot tell yet."""
        if sum(a.ended for a in sent) < max(_MIN_COMPARED, _COMPARED_SHARE * progress.planned):
            return None
        estimate = self._estimate(sent, progress)
        worst = estimate.worst if estimate is not None else None
        if estimate is None or worst is None or not _beyond_doubt(worst):
            return None
        if not self.needs.feasible_known and not can_be_ranked(estimate):
            return None
        why = f"expected to exceed {worst.name} by {worst.margin:.0%}, after {len(sent)} of {progress.planned} requests"
        return EarlyStop(End.STOP, why, self._bounds(sent, progress), StopReason.MISSED, estimate)

    def _bounds(self, sent: Sequence[Arrival], progress: LoadProgress) -> Measurement:
        return _least_measurement(sent, progress.now_s, progress.planned, self.slo, self.workload)

    def _compared(self, sent: Sequence[Arrival], progress: LoadProgress) -> EarlyStop | None:
        """Ends a load that will not beat the best configuration, or surely does and can be measured again."""
        best_s = self.needs.best_e2e_s
        ended = sum(a.ended for a in sent)
        if len(best_s) != progress.planned or ended < max(_MIN_COMPARED, _COMPARED_SHARE * progress.planned):
            return None
        ratio = mean_ratio(sent, best_s)
        if ratio is None:
            return None
        log_ratio, error, compared = ratio
        late = min(ended / progress.planned, 1.0)
        left = math.hypot(error * math.sqrt(1 - late), self.needs.bar_sd)
        excess = log_ratio - self.needs.bar + _NO_GAIN
        estimate = self._estimate(sent, progress)
        why = (
            f"mean E2E latency {math.expm1(log_ratio):+.1%} ± {error:.1%} against trial {self.needs.best} over "
            f"{compared} of {progress.planned} requests"
        )
        alike = self.needs.may_repeat and late >= _BETTER_SHARE and log_ratio > -_ALIKE
        if alike and excess < -_NO_DOUBT * left and _surely_meets(estimate):
            return EarlyStop(End.STOP, why, self._bounds(sent, progress), StopReason.BETTER, estimate)
        if excess > (_EARLY_DOUBT + (_LATE_DOUBT - _EARLY_DOUBT) * late) * left:
            return EarlyStop(End.STOP, why, self._bounds(sent, progress), StopReason.OUTPERFORMED, estimate)
        hope = _normal_cdf(-excess / max(left, 1e-3)) * _meets(estimate)
        if hope >= _MIN_HOPE:
            return None
        why += f"; meets the SLO and is better with probability {hope:.0%}"
        return EarlyStop(End.STOP, why, self._bounds(sent, progress), StopReason.OUTPERFORMED, estimate)


def _beyond_doubt(limit: LimitEstimate) -> bool:
    """Whether a limit will be missed: according to the estimate, and with more misses than chance explains."""
    return limit.log_excess > _NO_DOUBT * limit.sd + _NO_GAIN and limit.sigmas >= _MISSES_SIGMAS


def _surely_meets(estimate: LoadEstimate | None) -> bool:
    return estimate is not None and all(limit.log_excess < -_NO_DOUBT * limit.sd for limit in estimate.limits)


def _meets(estimate: LoadEstimate | None) -> float:
    """The probability that the complete load meets the SLO."""
    limits = estimate.limits if estimate is not None else ()
    return math.prod(_normal_cdf(-limit.log_excess / max(limit.sd, 1e-3)) for limit in limits)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def can_be_ranked(estimate: LoadEstimate | None) -> bool:
    """Whether the estimated violation is precise enough to be ranked against other loads."""
    if estimate is None:
        return False
    if estimate.sent >= _RANKED_SENT * estimate.planned:
        return True
    matter = [limit for limit in estimate.limits if limit.log_excess + limit.sd > 0]
    return all(limit.sd <= max(_RANKED_SD, _RANKED_SHARE * limit.log_excess) for limit in matter)


def surely_missed(
    sent: Sequence[Arrival], now_s: float, planned: int, slo: Slo, workload: Workload
) -> EarlyStop | None:
    """The early stop if, by arithmetic, a load of ``planned`` requests misses the SLO."""
    bounds = _least_measurement(sent, now_s, planned, slo, workload)
    limits = {limit.name: limit for limit in slo.latency_limits}
    for limit in slo_limits(bounds, slo):
        if limit.measured is None or limit.measured <= limit.limit:
            continue
        if limit.name in limits:
            why = _over(sent, planned, limits[limit.name], workload)
        else:
            what, share = _SHARES[limit.name]
            why = f"{round(share(bounds) * planned)} of {planned} requests {what}"
            why = f"{why}, {math.floor(planned * limit.limit + 1e-9)} are allowed"
        return EarlyStop(End.STOP, why, bounds)
    return None


_SHARES: dict[str, tuple[str, Callable[[Measurement], float]]] = {
    ERROR_RATE: ("failed", lambda m: m.error_rate),
    MISS_RATE: ("failed or were over a limit", lambda m: m.miss_rate or 0.0),
}


def _over(sent: Sequence[Arrival], planned: int, limit: LatencyLimit, workload: Workload) -> str:
    sample = sample_of(sent, planned, limit.kind, _most_gaps(workload))
    over, allowed = sample.over(limit)
    what = "times between tokens" if limit.kind is LatencyKind.ITL else "requests"
    return f"{over} of {sample.total} {what} were over {limit.name} {limit.limit_ms:g}, {allowed} are allowed"


def _least_measurement(
    sent: Sequence[Arrival], now_s: float, planned: int, slo: Slo, workload: Workload
) -> Measurement:
    least_ms = least_percentiles_ms(sent, planned, slo, _most_gaps(workload))
    missed = None if slo.goodput is None else sum(misses_already(a, slo.per_request) for a in sent)
    return lower_bounds(sent, now_s, planned, least_ms, sum(a.failed for a in sent), missed)


def _most_gaps(workload: Workload) -> int:
    return int(workload.output_tokens * (1 + workload.spread)) + 1
