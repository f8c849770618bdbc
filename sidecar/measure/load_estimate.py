"""The estimated final result of a partial load: each limit's statistic and the mean latency, with uncertainty. Pure.

TTFTs of unsent requests are drawn from the later half of those seen, plus the trend of that half if it is significant:
in a growing queue each request waits longer than the one before. A request still waiting for its first token gets at
least its age plus its share of the queue ahead. E2E latency is the TTFT plus a generation time drawn from the finished
requests. Percentiles are taken over the completed sample of ``planned`` requests.

Standard deviations are of logarithms. Their constants were fitted to loads of a simulated engine, truncated at random
and then finished.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sidecar.config.slo import ERROR_RATE, MISS_RATE, LatencyKind, LatencyLimit, Slo
from sidecar.measure.least_results import misses_already
from sidecar.measure.partial_load import Arrival, LimitEstimate, LoadEstimate, gaps_of
from vllm_sloguard.latency import nearest_rank

_Array: TypeAlias = NDArray[np.floating[Any]]

_MAX_LOG = math.log(50.0)  # cap on log(measured / limit)
_SIGNIFICANT = 2.0  # standard errors of the trend's slope
_MIN_SD, _TREND_SD = 0.03, 0.7
_TAIL_SD, _GAPS_TAIL_SD = 0.9, 0.2  # per factor of e between a p90 and its p99
_BURST_SD = 0.3  # of the service rate, relative to a Poisson count
_UNSEEN_HALF_SD = 0.15  # for effects that only appear in the unseen part
_MIN_MEAN_SD = 0.01
_UNSEEN_SD = 1.0
_FEWEST = 4  # minimum sample size for a statistic
_MAX_SIGMAS, _BLOCKS = 99.0, 10


@dataclass(frozen=True)
class _Sample:
    """Predicted latencies of a complete load, in seconds; the first ``seen`` of ``planned`` requests are known."""

    values_s: _Array
    seen: int
    planned: int
    trend_s: float = 0.0  # extra standard deviation from the trend at the end
    tail_sd: float = _TAIL_SD

    def log_statistic(self, share: float | None) -> tuple[float, float]:
        """log(percentile in seconds), or of the mean for None, and its standard deviation."""
        finite = self.values_s[np.isfinite(self.values_s)]
        if len(finite) < _FEWEST:
            return math.nan, _UNSEEN_SD
        unseen = math.sqrt(max(1 - self.seen / self.planned, 0.0))
        if share is None:
            mean = max(float(finite.mean()), 1e-6)
            sd = _MIN_SD + float(finite.std()) / mean / math.sqrt(max(self.seen, 4))
            return math.log(mean), math.hypot(sd * unseen, 0.5 * self.trend_s / mean)
        at, below = (_quantile(self.values_s, q) for q in (share, share - 9 * (1 - share)))
        if not math.isfinite(at):
            return math.inf, _UNSEEN_SD
        tail = math.log(at / below) if below > 0 else 1.0
        drawn = (_MIN_SD + self.tail_sd * tail) * unseen * math.sqrt(30 / max(self.seen, 10))
        return math.log(at), math.hypot(drawn + _UNSEEN_HALF_SD * unseen**2, self.trend_s / at)


def _quantile(values: _Array, share: float) -> float:
    ascending = np.sort(values)
    return max(float(ascending[nearest_rank(len(ascending), max(share, 0.01)) - 1]), 1e-6)


@dataclass(frozen=True)
class RunningLoad:
    """The requests ``sent`` so far, by arrival, of a load of ``planned`` requests at ``rate`` per second."""

    sent: Sequence[Arrival]
    now_s: float
    planned: int
    rate: float


def estimate_load(load: RunningLoad, slo: Slo, reference_s: Sequence[float] = ()) -> LoadEstimate | None:
    """The estimate; None without enough data.

    ``reference_s`` are the E2E latencies of the same requests under another configuration. Requests differ in length,
    so the ratio to the reference estimates the mean better than the latencies alone.
    """
    sent, planned = load.sent, load.planned
    if not sent or planned <= 0:
        return None
    ttfts, slope = _ttfts(load)
    ended = [a for a in sent if a.ended and not a.failed]
    e2e_s = ttfts.values_s + _generation(load, ended)
    tpots_s = np.array([tpot_s for a in ended if (tpot_s := a.tpot_s) is not None])
    samples = {
        LatencyKind.TTFT: ttfts,
        LatencyKind.E2E: _Sample(e2e_s, len(ended), planned, ttfts.trend_s),
        LatencyKind.ITL: _Sample(gaps_of(sent), len(ended), planned, tail_sd=_GAPS_TAIL_SD),
        LatencyKind.TPOT: _Sample(tpots_s, len(ended), planned),
    }
    seen_s = {
        LatencyKind.TTFT: np.array([a.ttft_s for a in sent]),
        LatencyKind.E2E: np.array([a.e2e_s for a in sent]),
        LatencyKind.ITL: samples[LatencyKind.ITL].values_s,
        LatencyKind.TPOT: tpots_s,
    }
    limits = [_limit(limit, samples[limit.kind], seen_s[limit.kind], ended) for limit in slo.latency_limits]
    limits.append(_share(ERROR_RATE, sum(a.failed for a in sent), len(sent), planned, slo.error_rate))
    if slo.goodput is not None:
        missed = [misses_already(a, slo.per_request) for a in sent]
        known = sum(miss or a.ended for miss, a in zip(missed, sent, strict=True))
        limits.append(_share(MISS_RATE, sum(missed), known, planned, slo.allowed_misses))
    mean_s, mean_sd = _mean(load, e2e_s, reference_s)
    return LoadEstimate(
        planned=planned,
        sent=len(sent),
        elapsed_s=load.now_s - sent[0].start_s,
        waiting=sum(not a.begun for a in sent),
        queue_growth=slope,
        limits=tuple(limits),
        mean_ms=None if mean_s is None else mean_s * 1000,
        mean_sd=math.hypot(mean_sd, 0.0 if mean_s is None else 0.5 * ttfts.trend_s / mean_s),
    )


def _limit(limit: LatencyLimit, sample: _Sample, seen_s: _Array, ended: Sequence[Arrival]) -> LimitEstimate:
    log_s, sd = sample.log_statistic(limit.statistic.share)
    over = float(np.mean(seen_s * 1000 > limit.limit_ms)) if len(seen_s) else 0.0
    log_excess = 0.0 if math.isnan(log_s) else log_s + math.log(1000 / limit.limit_ms)
    allowed = limit.allowed_share
    if allowed is None:  # a mean: its standard deviation says it all
        sigmas = _MAX_SIGMAS
    elif limit.kind is LatencyKind.ITL:
        sigmas = _gap_sigmas(ended, limit.limit_ms, allowed)
    else:
        sigmas = _miss_sigmas(over, len(seen_s), allowed)
    return LimitEstimate(limit.name, min(max(log_excess, -_MAX_LOG), _MAX_LOG), sd, over, sigmas)


def _miss_sigmas(over: float, n: int, allowed: float) -> float:
    """Standard deviations of a Poisson count between the misses, less one, and the number that is allowed."""
    expected = max(allowed * n, 1e-9)
    return min((over * n - expected - 1) / math.sqrt(expected), _MAX_SIGMAS)


def _gap_sigmas(ended: Sequence[Arrival], limit_ms: float, allowed: float) -> float:
    """The same for gaps. Requests that run together share slow steps, so the spread is that between blocks of them."""
    shares = [float(np.mean(a.gaps_s * 1000 > limit_ms)) for a in ended if len(a.gaps_s)]
    count = min(_BLOCKS, len(shares) // 3)
    if count < 2:
        return 0.0
    blocks = np.array([block.mean() for block in np.array_split(np.array(shares), count)])
    error = max(float(blocks.std(ddof=1)) / math.sqrt(count), allowed / math.sqrt(len(shares)))
    return min((float(blocks.mean()) - allowed) / error, _MAX_SIGMAS)


def _ttfts(load: RunningLoad) -> tuple[_Sample, float]:
    """The TTFTs of all planned requests, with their trend."""
    sent, now_s, planned, rate = load.sent, load.now_s, load.planned, max(load.rate, 1e-6)
    starts = np.array([a.start_s for a in sent])
    seen = np.array([a.ttft_s for a in sent])
    begun = np.array([a.begun for a in sent])
    finite = np.isfinite(seen)
    waiting = np.flatnonzero(~begun)
    if len(waiting) and begun.any():
        firsts = np.sort((starts + seen)[begun & finite])
        recent = firsts[len(firsts) // 2 :]
        span = max(now_s - float(recent[0]), 1e-3) if len(recent) else max(now_s - float(starts[0]), 1e-3)
        per_s = min(max(len(recent), 1) / span, max(rate, 1e-6) * 4)
        seen = seen.copy()
        seen[waiting] += np.arange(1, len(waiting) + 1) / per_s
    half = np.flatnonzero(finite)[int(finite.sum()) // 2 :]
    future = planned - len(sent)
    if len(half) < 4:
        filler = float(np.max(seen[finite])) if finite.any() else now_s - float(starts[0])
        return _Sample(np.append(seen, np.full(max(future, 0), filler)), len(sent), planned, filler), 0.0
    slope, error = _slope(starts[half], seen[half])
    # Neighbours are correlated, so there are fewer independent values than requests.
    significant = slope > _SIGNIFICANT * error and len(waiting) > 0
    if significant:
        # A burst raises TTFT too; the queue keeps growing only if first tokens come more slowly than requests.
        middle_s = float(starts[half[0]])
        firsts = (starts + seen)[begun & finite]
        served = max(int(((firsts > middle_s) & (firsts <= now_s)).sum()), 1)
        excess = rate * (now_s - middle_s) / served
        slope, error = min(slope, max(excess - 1.0, 0.0)), math.hypot(error, _BURST_SD * excess / math.sqrt(served))
    slope = max(slope, 0.0) if significant else 0.0
    values = seen
    trend_s = 0.0
    if future > 0:
        coming = now_s + np.arange(1, future + 1) / max(rate, 1e-6)
        drawn = seen[half][np.arange(future) % len(half)]
        drawn_at = starts[half][np.arange(future) % len(half)]
        values = np.append(seen, np.maximum(drawn + slope * (coming - drawn_at), 1e-6))
        ahead_s = float(coming[-1]) - float(np.mean(starts[half]))
        trend_s = _TREND_SD * error * ahead_s if significant else 0.25 * error * ahead_s
    return _Sample(values, int(begun.sum()), planned, trend_s), slope


def _slope(at: _Array, values: _Array) -> tuple[float, float]:
    """Least-squares slope and its standard error, widened for correlated neighbours."""
    centred = at - at.mean()
    spread = float(centred @ centred)
    if spread <= 0:
        return 0.0, 0.0
    slope = float(centred @ (values - values.mean())) / spread
    residual = values - values.mean() - slope * centred
    lagged = float(residual[1:] @ residual[:-1]) / max(float(residual @ residual), 1e-12)
    widen = math.sqrt((1 + min(max(lagged, 0.0), 0.9)) / (1 - min(max(lagged, 0.0), 0.9)))
    return slope, widen * math.sqrt(float(residual @ residual) / max(len(at) - 2, 1) / spread)


def _generation(load: RunningLoad, ended: Sequence[Arrival]) -> _Array:
    """Generation times: observed, bounded below by the time so far, or drawn from the finished requests."""
    elapsed_s = load.now_s - load.sent[0].start_s
    drawn = np.sort([a.e2e_s - a.ttft_s for a in ended]) if ended else np.array([elapsed_s])
    count = max(load.planned, len(load.sent))
    values = drawn[(np.arange(count) * 7919) % len(drawn)].astype(float)  # a fixed shuffle
    for index, a in enumerate(load.sent):
        if a.ended:
            values[index] = 0.0 if a.failed else a.e2e_s - a.ttft_s
        elif a.begun:
            age = load.now_s - a.start_s - a.ttft_s
            longer = drawn[drawn > age]
            values[index] = float(longer[len(longer) // 2]) if len(longer) else 1.2 * age
    return values


def _share(name: str, bad: int, known: int, planned: int, limit: float) -> LimitEstimate:
    """A share of requests: the ``bad`` ones of the ``known``, extrapolated to the remaining requests."""
    share = bad / known if known else 0.0
    if not limit:
        return LimitEstimate(name, _MAX_LOG if bad else -_MAX_LOG, 0.1, share, _MAX_SIGMAS)
    expected = (bad + share * (planned - known)) / planned
    log_excess = min(max(math.log(max(expected, 1e-4) / limit), -_MAX_LOG), _MAX_LOG)
    sd = 1 / math.sqrt(max(bad - 1, 0.5))
    return LimitEstimate(name, log_excess, min(sd, _UNSEEN_SD), share, _miss_sigmas(share, known, limit))


def _mean(load: RunningLoad, predicted_s: _Array, reference_s: Sequence[float]) -> tuple[float | None, float]:
    """The final mean E2E latency, and the standard deviation of its logarithm."""
    finite = predicted_s[np.isfinite(predicted_s)]
    if not len(finite):
        return None, _UNSEEN_SD
    done = sum(a.ended and not a.failed for a in load.sent)
    unseen = math.sqrt(max(1 - done / load.planned, 0.0))
    ratio = mean_ratio(load.sent, reference_s) if len(reference_s) == load.planned else None
    if ratio is not None:
        reference = np.array(reference_s)
        mean = float(reference[np.isfinite(reference)].mean()) * math.exp(ratio[0])
        return mean, _MIN_MEAN_SD + ratio[1] * unseen
    spread = float(finite.std()) / max(float(finite.mean()), 1e-9)
    return float(finite.mean()), _MIN_MEAN_SD + spread * unseen / math.sqrt(max(done, 4)) * 2


def mean_ratio(sent: Sequence[Arrival], reference_s: Sequence[float]) -> tuple[float, float, int] | None:
    """Log ratio of the mean E2E latency to the reference's over the seen requests, its standard error, their number.

    Unfinished requests count with their age if they are already slower than the reference.
    """
    pairs = [
        (a.e2e_s, r)
        for a, r in zip(sent, reference_s, strict=False)
        if not a.failed and math.isfinite(r) and r > 0 and (a.ended or a.e2e_s > r)
    ]
    if len(pairs) < 8:
        return None
    ours, theirs = np.array(pairs).T
    ratio = float(ours.sum() / theirs.sum())
    residual = ours - ratio * theirs
    lagged = float(residual[1:] @ residual[:-1]) / max(float(residual @ residual), 1e-12)
    widen = math.sqrt((1 + min(max(lagged, 0.0), 0.8)) / (1 - min(max(lagged, 0.0), 0.8)))
    error = widen * float(residual.std()) / float(ours.mean()) / math.sqrt(len(pairs))
    return math.log(ratio), error, len(pairs)
