"""Real users' requests and their SLO record, from the plugin's telemetry."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, cast

from pydantic import BeforeValidator, TypeAdapter

from sidecar.config.slo import LatencyKind, LatencyLimit, Slo, Statistic, within_limits
from sidecar.observe.traffic import REJECTED, Traffic, is_probe
from vllm_sloguard.latency import GapHistogram, itl_of_request, percentile
from vllm_sloguard.wire import telemetry_pb2 as pb

# The averaging period of the rate compared with window.max_rate.
RATE_OVER_S = 300.0
_SHORTEST_S = 60.0


@dataclass(frozen=True)
class OwnItls:
    """Percentiles (nearest rank) and maximum of one request's ITLs, in milliseconds."""

    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    largest_ms: float


@dataclass(frozen=True)
class UserRequest:
    """A finished user request. ``at`` is in monotonic seconds; unmeasured fields are None.

    ``tpot_ms`` is the mean gap between tokens, ``itl`` the gaps' percentiles; both None for fewer than two tokens, or
    if the plugin reports none. ``failed`` requests ended in an error or were rejected. ``aborted`` ones were cancelled
    by the client; their latencies are up to that point.
    """

    at: float
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float
    prompt_tokens: int
    output_tokens: int
    failed: bool = False
    itl: OwnItls | None = None
    aborted: bool = False

    @property
    def largest_gap_ms(self) -> float | None:
        """The largest ITL."""
        return self.itl.largest_ms if self.itl is not None else None


@dataclass(frozen=True)
class Record:
    """Aggregate of many requests. ``rate`` is in requests/s, None if observed too briefly.

    ``itl_p99_ms`` is over all gaps between tokens, other percentiles are over requests. Requests aborted within the SLO
    count only as ``aborted``.
    """

    requests: int
    missed: int
    rate: float | None
    prompt_tokens: float
    output_tokens: float
    ttft_p99_ms: float | None
    itl_p99_ms: float | None
    tpot_p99_ms: float | None = None
    e2e_p99_ms: float | None = None
    aborted: int = 0
    failed: int = 0
    largest_gap_p99_ms: float | None = None


def _with_tpot(content: object) -> object:
    """Reads records of earlier versions, which stored TPOT's p99 under ITL's name."""
    if isinstance(content, dict) and "itl_p99_ms" in content and "tpot_p99_ms" not in content:
        stored = cast("dict[str, object]", content)
        return {**stored, "tpot_p99_ms": stored["itl_p99_ms"], "itl_p99_ms": None}
    return cast("object", content)


RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, BeforeValidator(_with_tpot)])


def real_requests(traffic: Traffic | None) -> list[UserRequest]:
    """The sampled requests, without the sidecar's probes."""
    sample = traffic.requests if traffic is not None else ()
    reported = ((sampled.at, sampled.request) for sampled in sample)
    return [user_request(at, request) for at, request in reported if not is_probe(request)]


def user_request(at: float, request: pb.RequestFinished) -> UserRequest:
    """The request that was reported at ``at``."""
    return UserRequest(
        at,
        request.ttft_seconds * 1000 if request.HasField("ttft_seconds") else None,
        request.inter_token_seconds * 1000 if request.HasField("inter_token_seconds") else None,
        request.e2e_seconds * 1000,
        request.prompt_tokens,
        request.output_tokens,
        failed=request.finish_reason in ("error", REJECTED),
        itl=_own_itls(request),
        aborted=request.finish_reason == "abort",
    )


def _own_itls(request: pb.RequestFinished) -> OwnItls | None:
    if not request.HasField("gap_p99_seconds"):
        return None
    return OwnItls(
        request.gap_p50_seconds * 1000,
        request.gap_p90_seconds * 1000,
        request.gap_p95_seconds * 1000,
        request.gap_p99_seconds * 1000,
        request.largest_gap_seconds * 1000,
    )


def rate(traffic: Traffic, now: float, over_s: float) -> float | None:
    """User requests per second over the last ``over_s``; None in the first minute."""
    watched_s = min(now - traffic.since, over_s)
    if watched_s < _SHORTEST_S:
        return None
    return traffic.ended_after(now - watched_s) / watched_s


def judged(requests: Iterable[UserRequest], slo: Slo) -> list[UserRequest]:
    """The requests judged against the SLO: all but those aborted before they had missed a limit."""
    limits = slo.per_request
    return [r for r in requests if not r.aborted or _missed(r, limits)]


def summarize(
    requests: Sequence[UserRequest], slo: Slo, requests_per_s: float | None, gaps: GapHistogram | None = None
) -> Record:
    """The record of ``requests``; ``gaps`` are their gaps between tokens."""
    counted, limits = judged(requests, slo), slo.per_request
    count = len(counted)
    completed = [r for r in counted if not r.failed]
    itl_p99_s = gaps.percentile(0.99) if gaps is not None else None
    return Record(
        count,
        sum(_missed(r, limits) for r in counted),
        requests_per_s,
        sum(r.prompt_tokens for r in counted) / count if count else 0.0,
        sum(r.output_tokens for r in counted) / count if count else 0.0,
        p99([ms for r in counted if (ms := ttft_or_wait_ms(r)) is not None]),
        None if itl_p99_s is None else itl_p99_s * 1000,
        p99([r.tpot_ms for r in counted if r.tpot_ms is not None]),
        p99([r.e2e_ms for r in completed]),
        len(requests) - count,
        sum(r.failed for r in counted),
        p99([r.largest_gap_ms for r in counted if r.largest_gap_ms is not None]),
    )


def missed_slo(request: UserRequest, slo: Slo) -> bool:
    """Whether it failed, exceeded a limit, or was aborted after a limit had passed."""
    return _missed(request, slo.per_request)


def _missed(request: UserRequest, limits: Sequence[LatencyLimit]) -> bool:
    return request.failed or not within_limits(limits, lambda limit: latency_s(request, limit))


def latency_s(request: UserRequest, limit: LatencyLimit) -> float | None:
    """The latency that ``limit`` applies to, in seconds; None if the request has none."""
    match limit.kind:
        case LatencyKind.TTFT:
            ms = ttft_or_wait_ms(request)
        case LatencyKind.ITL:
            ms = _itl_ms(request, limit)
        case LatencyKind.TPOT:
            ms = request.tpot_ms
        case LatencyKind.E2E:
            ms = request.e2e_ms
    return None if ms is None else ms / 1000


def ttft_or_wait_ms(request: UserRequest) -> float | None:
    """TTFT; for a request aborted before its first token, how long its client waited."""
    return request.e2e_ms if request.ttft_ms is None and request.aborted else request.ttft_ms


def _itl_ms(request: UserRequest, limit: LatencyLimit) -> float | None:
    """The percentile of the request's own ITLs, or its largest ITL if that is a stall."""
    itl = request.itl
    if itl is None:
        return request.tpot_ms  # no gaps reported; their p99 is hardly ever below their mean
    own_ms = {Statistic.P50: itl.p50_ms, Statistic.P90: itl.p90_ms, Statistic.P95: itl.p95_ms}
    return itl_of_request(own_ms.get(limit.statistic, itl.p99_ms), itl.largest_ms, limit.limit_ms)


def p99(values: Iterable[float]) -> float | None:
    """The smallest value that 99% do not exceed."""
    return percentile(values, 0.99)
