"""The SLO as operators write it: limits named KIND_STATISTIC_ms, such as ``ttft_p99_ms``, an error rate, and goodput.

All other code iterates over ``LatencyLimit``; no other module lists the fields. The latency kinds are those of
vllm_sloguard.latency. A statistic of ``itl`` is over all gaps between tokens of all requests, a statistic of the other
kinds is over requests.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, SerializerFunctionWrapHandler, model_serializer, model_validator

from sidecar.config.window import Section


class LatencyKind(StrEnum):
    """The kind of latency, as defined in vllm_sloguard.latency."""

    TTFT = "ttft"
    ITL = "itl"
    TPOT = "tpot"
    E2E = "e2e"


class Statistic(StrEnum):
    """Which statistic of a sample of latencies."""

    P50 = "p50"
    P90 = "p90"
    P95 = "p95"
    P99 = "p99"
    MEAN = "mean"

    @property
    def share(self) -> float | None:
        """0.99 for p99; None for the mean."""
        return None if self is Statistic.MEAN else int(self.value[1:]) / 100


@dataclass(frozen=True)
class LatencyStatistic:
    """One statistic of one kind of latency, which can be measured and limited."""

    kind: LatencyKind
    statistic: Statistic

    @cached_property
    def name(self) -> str:
        """The field name in the SLO and in a measurement: "ttft_p99_ms"."""
        return f"{self.kind}_{self.statistic}_ms"

    @property
    def label(self) -> str:
        """Display name: "TTFT p99", "mean E2E"."""
        kind = self.kind.upper()
        return f"mean {kind}" if self.statistic is Statistic.MEAN else f"{kind} {self.statistic}"


@dataclass(frozen=True)
class LatencyLimit(LatencyStatistic):
    """A limit of the SLO, in milliseconds."""

    limit_ms: float

    @property
    def allowed_share(self) -> float | None:
        """The share of the sample that may exceed the limit: 0.01 for p99; None for the mean."""
        share = self.statistic.share
        return None if share is None else round(1 - share, 9)


# In display order.
LATENCY_STATISTICS = tuple(LatencyStatistic(kind, statistic) for kind in LatencyKind for statistic in Statistic)
ERROR_RATE = "error_rate"
# The complement of goodput, so that every limit is an upper one.
MISS_RATE = "miss_rate"
_FROM_THE_START = frozenset({"ttft_p99_ms", "itl_p99_ms", "e2e_p99_ms", ERROR_RATE})
ALLOWED_NAMES = (
    "ttft, itl, tpot or e2e, then p50, p90, p95, p99 or mean, then ms (ttft_p99_ms: 500, tpot_mean_ms: 30),"
    " error_rate (0.01), and goodput (0.99)"
)


class Slo(Section):
    """Limits on latencies, in milliseconds, and on shares of requests.

    ``error_rate`` is the maximum share that may fail; ``goodput`` is the minimum share that must meet ``per_request``,
    the limits that apply to a single request.
    """

    ttft_p50_ms: PositiveFloat | None = None
    ttft_p90_ms: PositiveFloat | None = None
    ttft_p95_ms: PositiveFloat | None = None
    ttft_p99_ms: PositiveFloat | None = None
    ttft_mean_ms: PositiveFloat | None = None
    itl_p50_ms: PositiveFloat | None = None
    itl_p90_ms: PositiveFloat | None = None
    itl_p95_ms: PositiveFloat | None = None
    itl_p99_ms: PositiveFloat | None = None
    itl_mean_ms: PositiveFloat | None = None
    tpot_p50_ms: PositiveFloat | None = None
    tpot_p90_ms: PositiveFloat | None = None
    tpot_p95_ms: PositiveFloat | None = None
    tpot_p99_ms: PositiveFloat | None = None
    tpot_mean_ms: PositiveFloat | None = None
    e2e_p50_ms: PositiveFloat | None = None
    e2e_p90_ms: PositiveFloat | None = None
    e2e_p95_ms: PositiveFloat | None = None
    e2e_p99_ms: PositiveFloat | None = None
    e2e_mean_ms: PositiveFloat | None = None
    error_rate: Annotated[float, Field(ge=0, lt=1)] = 0.01
    goodput: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "Slo":
        if not self.latency_limits:
            raise ValueError(f"at least one latency limit is needed: {ALLOWED_NAMES}")
        if self.goodput is not None and not self.per_request:
            raise ValueError("goodput: a limit on a percentile is needed, such as ttft_p99_ms; a mean is of no request")
        return self

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # An SLO of p99s is serialised as in earlier versions, so that their measurements still match.
        content: dict[str, Any] = dump(self)
        return {name: limit for name, limit in content.items() if limit is not None or name in _FROM_THE_START}

    @property
    def latency_limits(self) -> tuple[LatencyLimit, ...]:
        """All configured latency limits."""
        limits = ((s, getattr(self, s.name)) for s in LATENCY_STATISTICS)
        return tuple(LatencyLimit(s.kind, s.statistic, limit_ms) for s, limit_ms in limits if limit_ms is not None)

    @property
    def per_request(self) -> tuple[LatencyLimit, ...]:
        """The limits that a single request can miss: for each kind, its highest limited percentile.

        A mean does not constrain a single request, and of two percentiles the lower allows more slow requests.
        """
        highest: dict[LatencyKind, LatencyLimit] = {}
        for limit in self.latency_limits:  # percentiles ascending
            if limit.allowed_share is not None:
                highest[limit.kind] = limit
        return tuple(highest.values())

    @property
    def share_limits(self) -> dict[str, float]:
        """The maximum shares of requests that may fail, and with ``goodput`` that may miss a limit, by name."""
        return {ERROR_RATE: self.error_rate, **({} if self.goodput is None else {MISS_RATE: self.allowed_misses})}

    @property
    def upper_limits(self) -> dict[str, float]:
        """Every limit by its name in a measurement, in milliseconds or as a share."""
        return {**{limit.name: limit.limit_ms for limit in self.latency_limits}, **self.share_limits}

    @property
    def allowed_misses(self) -> float:
        """The error budget: the share of requests that may miss one of ``per_request``, or fail.

        Set by ``goodput``, otherwise that of the most generous limit.
        """
        if self.goodput is not None:
            return round(1 - self.goodput, 9)
        shares = [limit.allowed_share for limit in self.per_request if limit.allowed_share is not None]
        return max([*shares, self.error_rate])


# Reads one latency of one request, in seconds; None if the request has none, such as ITL with a single token.
RequestLatency = Callable[[LatencyLimit], float | None]


def within_limits(limits: Iterable[LatencyLimit], latency_s: RequestLatency) -> bool:
    """Whether a successful request meets all of ``limits``."""
    for limit in limits:
        seconds = latency_s(limit)
        if seconds is not None and seconds * 1000 > limit.limit_ms:
            return False
    return True
