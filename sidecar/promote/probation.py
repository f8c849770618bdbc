"""Whether a promotion may stay, judged by real users' requests and by crashes. Pure.

It is rolled back when

1. it burns the error budget: of at least ``min_requests`` requests, the share that missed a limit or failed is at least
   ``burn`` times the budget, and under comparable traffic more than the incumbent's own misses explain. The budget is
   ``Slo.allowed_misses``, each percentile's own for the requests above its limit, and ``error_rate`` for failures.
   Where ``burn`` times a budget is too much of everything, as for a p50, the share halfway between the budget and 1
   counts;
2. it is slower than the incumbent was: more of its requests than chance explains are above the incumbent's p99 from
   before the window by more than ``tolerance``, in TTFT, TPOT or their largest gap between tokens; the incumbent needs
   ``min_requests`` too, under comparable traffic; or
3. it crashes ``crashes`` times within ``crashes_within`` seconds, in probation or after it.

Traffic is comparable where its rate is within a factor of 2 and its mean prompt and output are within one of 1.5.

The incumbent's p99 is an order statistic of n0 requests, not the truth. If nothing has changed, the probability of a
request above the value of rank r is distributed as Beta(n0 - r + 1, r), whatever the latencies' distribution, and the
number of such requests among n as a beta-binomial: that is the test (the exceedance test). Its error of FALSE_ALARMS in
all is shared by the statistics and by the analyses: after ``min_requests``, each 1.5 times as many, and at the end.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from sidecar.config.slo import Slo
from sidecar.config.window import Probation
from sidecar.observe.user_requests import Record, UserRequest, judged, latency_s, summarize, ttft_or_wait_ms
from vllm_sloguard.latency import nearest_rank

# The share of promotions without a regression that are rolled back for one, at most.
FALSE_ALARMS = 0.005
_P99 = 0.99
# Analyses from 200 requests to a million are 21; a sample that is thinned out adds a few.
_ANALYSES = 30
_GROWTH = 1.5
_RATES_WITHIN, _LENGTHS_WITHIN = 2.0, 1.5


class ProbationVerdict(StrEnum):
    """What becomes of the promotion."""

    GOES_ON = "goes_on"
    PASSED = "passed"
    REGRESSION = "regression"
    SLO_BURN = "slo_burn"
    CRASH_LOOP = "crash_loop"
    START_FAILED = "start_failed"


@dataclass(frozen=True)
class Ruling:
    """The verdict, in one sentence with its numbers."""

    verdict: ProbationVerdict
    reason: str

    @property
    def rolls_back(self) -> bool:
        """Whether the promotion is taken back."""
        return self.verdict not in (ProbationVerdict.GOES_ON, ProbationVerdict.PASSED)


def judge(  # noqa: PLR0917 - all that the rule depends on
    before: Record | None,
    requests: Sequence[UserRequest],
    requests_per_s: float | None,
    slo: Slo,
    rule: Probation,
    left_s: float,
) -> Ruling:
    """The ruling on the ``requests`` since the promotion, ``left_s`` seconds before the probation ends."""
    counted = judged(requests, slo)
    now = summarize(counted, slo, requests_per_s)
    enough = now.requests >= rule.min_requests
    reference = before if before and before.requests >= rule.min_requests and comparable(before, now) else None
    if enough and (burn := _burns(now, counted, reference, slo, rule)):
        return Ruling(ProbationVerdict.SLO_BURN, burn)
    due = counted[: _analysed(len(counted), rule.min_requests)] if left_s > 0 else counted
    if enough and reference and (slower := _slower(reference, due, rule)):
        return Ruling(ProbationVerdict.REGRESSION, slower)
    if left_s > 0:
        return Ruling(ProbationVerdict.GOES_ON, f"{left_s:.0f} s of the probation left, {len(counted)} requests")
    if not enough:
        return Ruling(ProbationVerdict.PASSED, f"{now.requests} requests in the probation were too few to judge by")
    than = "no worse than the incumbent" if reference else "no comparable traffic of the incumbent"
    return Ruling(ProbationVerdict.PASSED, f"{now.requests} requests, {now.missed} of them missed the SLO; {than}")


def _analysed(count: int, least: int) -> int:
    """The requests of the last analysis that is due."""
    if count < least:
        return 0
    return math.ceil(least * _GROWTH ** math.floor(math.log(count / least, _GROWTH) + 1e-9))


def comparable(before: Record, now: Record) -> bool:
    """Whether the traffic is much the same; unknown rates are not."""
    if before.rate is None or now.rate is None:
        return False
    return (
        _within(before.rate, now.rate, _RATES_WITHIN)
        and _within(before.prompt_tokens, now.prompt_tokens, _LENGTHS_WITHIN)
        and _within(before.output_tokens, now.output_tokens, _LENGTHS_WITHIN)
    )


def crash_loop(times: Sequence[float], now: float, rule: Probation) -> Ruling | None:
    """The ruling on crashes at ``times``, on the clock of ``now``; None where they are no loop."""
    recent = sum(0 <= now - at <= rule.crashes_within for at in times)
    if recent < rule.crashes:
        return None
    return Ruling(ProbationVerdict.CRASH_LOOP, f"it crashed {recent} times within {rule.crashes_within / 60:g} minutes")


def _burns(now: Record, counted: Sequence[UserRequest], before: Record | None, slo: Slo, rule: Probation) -> str:
    budgets = [("missed the SLO", now.missed, slo.allowed_misses or 1 - _P99)]
    for limit in slo.per_request:
        over = sum((of := latency_s(r, limit)) is not None and of * 1000 > limit.limit_ms for r in counted)
        budgets.append((f"were over {limit.name} {limit.limit_ms:g}", over, limit.allowed_share or 1 - _P99))
    # A small error rate allows so few failures that chance alone may multiply them.
    if slo.error_rate and _is_more_than(now.failed, now.requests, slo.error_rate):
        budgets.append(("failed", now.failed, slo.error_rate))
    for what, count, budget in budgets:
        if count < min(rule.burn * budget, (1 + budget) / 2) * now.requests - 1e-9:
            continue
        # The incumbent's misses are of any limit, so they explain at least as many of this one.
        if before is None or _is_more(count, now.requests, before.missed, before.requests):
            times = count / now.requests / budget
            return f"{count} of {now.requests} requests {what}, {times:.1f} times the error budget"
    return ""


_Latency = Callable[[UserRequest], float | None]


def _slower(before: Record, requests: Sequence[UserRequest], rule: Probation) -> str:
    statistics: tuple[tuple[str, float | None, _Latency], ...] = (
        ("a TTFT", before.ttft_p99_ms, ttft_or_wait_ms),
        ("a TPOT", before.tpot_p99_ms, lambda r: r.tpot_ms),
        ("a gap between tokens", before.largest_gap_p99_ms, lambda r: r.largest_gap_ms),
    )
    beyond = before.requests - nearest_rank(before.requests, _P99)
    for name, p99_ms, of in statistics:
        measured = [ms for r in requests if (ms := of(r)) is not None]
        if p99_ms is None or len(measured) < rule.min_requests:
            continue
        limit_ms = p99_ms * (1 + rule.tolerance)
        above = sum(ms > limit_ms for ms in measured)
        if _is_more(above, len(measured), beyond, before.requests):
            share = f"{above} of {len(measured)} requests had {name} above {limit_ms:.4g} ms"
            return f"{share}, which the incumbent's p99 of {p99_ms:.4g} ms does not explain"
    return ""


def _is_more(count: int, of: int, count_before: int, of_before: int) -> bool:
    """Whether ``count`` of ``of`` requests is more than chance explains, at the error of one statistic and analysis."""
    return exceedance_tail(count, of, count_before, of_before) < FALSE_ALARMS / (4 * _ANALYSES)


def _is_more_than(count: int, of: int, share: float) -> bool:
    """Whether ``count`` of ``of`` requests is more than chance explains if ``share`` of all are like them."""
    from scipy.special import bdtrc  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    return count > 0 and float(bdtrc(count - 1, of, share)) < FALSE_ALARMS / (4 * _ANALYSES)


def exceedance_tail(count: int, of: int, count_before: int, of_before: int) -> float:
    """The probability that ``count`` or more of ``of`` requests exceed what ``count_before`` of ``of_before`` exceeded.

    Under the same distribution; the beta-binomial with the parameters count_before + 1 and of_before - count_before.
    """
    from scipy.special import betaln, gammaln  # pyright: ignore

    a, b, k = count_before + 1, max(of_before - count_before, 1), np.arange(count, of + 1)
    logs = gammaln(of + 1) - gammaln(k + 1) - gammaln(of - k + 1) + betaln(k + a, of - k + b) - betaln(a, b)  # pyright: ignore[reportUnknownVariableType]
    return min(float(np.exp(logs).sum()), 1.0)  # pyright: ignore[reportUnknownArgumentType]


def _within(a: float, b: float, factor: float) -> bool:
    return min(a, b) > 0 and max(a, b) <= factor * min(a, b)
