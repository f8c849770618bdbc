"""Whether what was promoted may stay, judged by real requests and by crashes. Pure.

It may not when

1. it misses the SLO: of at least ``min_requests`` requests, the share that missed a limit or failed is ``burn`` times
   the error budget, and not below the share that the incumbent missed under comparable traffic;
2. it is slower than the incumbent was: more of its requests than chance explains (a one-sided binomial test at
   1 in 1000) are slower, by ``tolerance``, than the 99th percentile of the incumbent's own requests before the window,
   where these were at least ``min_requests`` too and the traffic is comparable; or
3. it crashes ``crashes`` times within ``crashes_within`` seconds, in probation or after it.

Traffic is comparable where its rate is within a factor of 2 and its mean prompt and output are within one of 1.5.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sidecar.config.slo import Slo
from sidecar.config.window import Probation
from sidecar.observe.user_requests import Record, UserRequest, summarize

# The limits are on 99th percentiles.
_BUDGET = 0.01
_CHANCE = 0.001
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


def judge(  # noqa: PLR0917 - all that the rule looks at
    before: Record | None,
    requests: Sequence[UserRequest],
    requests_per_s: float | None,
    slo: Slo,
    rule: Probation,
    left_s: float,
) -> Ruling:
    """The ruling on the ``requests`` since the promotion, ``left_s`` seconds before the probation ends."""
    now = summarize(requests, slo, requests_per_s)
    enough = now.requests >= rule.min_requests
    alike = before is not None and before.requests >= rule.min_requests and comparable(before, now)
    if enough and (burn := _burns(now, before if alike else None, slo, rule)):
        return Ruling(ProbationVerdict.SLO_BURN, burn)
    if enough and alike and before is not None and (slower := _slower(before, requests, rule)):
        return Ruling(ProbationVerdict.REGRESSION, slower)
    if left_s > 0:
        return Ruling(ProbationVerdict.GOES_ON, f"on probation for {left_s:.0f} s more, {now.requests} requests so far")
    if not enough:
        return Ruling(ProbationVerdict.PASSED, f"{now.requests} requests in the probation were too few to judge by")
    with_what = "no worse than the incumbent was" if alike else "no comparable traffic of the incumbent"
    return Ruling(ProbationVerdict.PASSED, f"{now.requests} requests, {now.missed} of them missed the SLO; {with_what}")


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


def _burns(now: Record, before: Record | None, slo: Slo, rule: Probation) -> str:
    budget = max(_BUDGET, slo.error_rate)
    share = now.missed / now.requests
    if share < rule.burn * budget or (before is not None and share <= before.missed / before.requests):
        return ""
    return f"{now.missed} of {now.requests} requests missed the SLO, {share / budget:.1f} times the error budget"


def _slower(before: Record, requests: Sequence[UserRequest], rule: Probation) -> str:
    looked_at: tuple[tuple[str, float | None, Callable[[UserRequest], float | None]], ...] = (
        ("TTFT", before.ttft_p99_ms, lambda r: r.ttft_ms),
        ("TPOT", before.tpot_p99_ms, lambda r: r.tpot_ms),
    )
    for name, p99_ms, of in looked_at:
        measured = [ms for r in requests if (ms := of(r)) is not None]
        if p99_ms is None or len(measured) < rule.min_requests:
            continue
        limit_ms = p99_ms * (1 + rule.tolerance)
        above = sum(ms > limit_ms for ms in measured)
        if binomial_tail(above, len(measured), _BUDGET) < _CHANCE:
            share = f"{above} of {len(measured)} requests had a {name} above {limit_ms:.4g} ms"
            return f"{share}, which the incumbent's p99 of {p99_ms:.4g} ms does not explain"
    return ""


def binomial_tail(count: int, of: int, chance: float) -> float:
    """The probability of ``count`` or more successes in ``of`` trials, each of the probability ``chance``."""
    from scipy.special import bdtrc  # pyright: ignore

    return float(bdtrc(count - 1, of, chance)) if count > 0 else 1.0  # pyright: ignore[reportUnknownArgumentType]


def _within(a: float, b: float, factor: float) -> bool:
    return min(a, b) > 0 and max(a, b) <= factor * min(a, b)
