"""The service's own requests, from what the plugin tells of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from sidecar.config.slo import Slo
from sidecar.observe.telemetry import Traffic
from vllm_sloguard.wire import telemetry_pb2 as pb

# What a window's ceiling is compared with.
RATE_OVER_S = 300.0
# The sidecar's own probe: "a", and one token.
_PROBE_PROMPT_TOKENS, _PROBE_OUTPUT_TOKENS = 2, 1
_SHORTEST_S = 60.0


@dataclass(frozen=True)
class UserRequest:
    """A real request. ``at`` is in monotonic seconds; what was not measured is None."""

    at: float
    ttft_ms: float | None
    itl_ms: float | None  # mean of the request
    e2e_ms: float
    prompt_tokens: int
    output_tokens: int
    failed: bool = False


@dataclass(frozen=True)
class Record:
    """What many requests come to. ``rate`` is in requests/s, None where it was not watched for long enough."""

    requests: int
    missed: int
    rate: float | None
    prompt_tokens: float
    output_tokens: float
    ttft_p99_ms: float | None
    itl_p99_ms: float | None


RECORD = TypeAdapter(Record)


def real_requests(traffic: Traffic | None) -> list[UserRequest]:
    """Without the sidecar's probes, and without what a client has given up."""
    heard = traffic.requests if traffic is not None else ()
    return [_request(at, r) for at, r in heard if r.finish_reason != "abort" and not _is_probe(r)]


def _is_probe(request: pb.RequestFinished) -> bool:
    return request.prompt_tokens <= _PROBE_PROMPT_TOKENS and request.output_tokens <= _PROBE_OUTPUT_TOKENS


def _request(at: float, request: pb.RequestFinished) -> UserRequest:
    return UserRequest(
        at,
        request.ttft_seconds * 1000 if request.HasField("ttft_seconds") else None,
        request.inter_token_seconds * 1000 if request.HasField("inter_token_seconds") else None,
        request.e2e_seconds * 1000,
        request.prompt_tokens,
        request.output_tokens,
        failed=request.finish_reason == "error",
    )


def rate(requests: Sequence[UserRequest], since: float, now: float, over_s: float) -> float | None:
    """Requests a second over the last ``over_s``, of those heard of since ``since``; None in the first minute."""
    watched_s = min(now - since, over_s)
    if watched_s < _SHORTEST_S:
        return None
    return sum(r.at > now - watched_s for r in requests) / watched_s


def summarize(requests: Sequence[UserRequest], slo: Slo, requests_per_s: float | None) -> Record:
    """The record of ``requests``."""
    count = len(requests)
    return Record(
        count,
        sum(missed_slo(r, slo) for r in requests),
        requests_per_s,
        sum(r.prompt_tokens for r in requests) / count if count else 0.0,
        sum(r.output_tokens for r in requests) / count if count else 0.0,
        p99([r.ttft_ms for r in requests if r.ttft_ms is not None]),
        p99([r.itl_ms for r in requests if r.itl_ms is not None]),
    )


def missed_slo(request: UserRequest, slo: Slo) -> bool:
    """Whether it failed, or was above any limit."""
    pairs = (
        (request.ttft_ms, slo.ttft_p99_ms),
        (request.itl_ms, slo.itl_p99_ms),
        (request.e2e_ms, slo.e2e_p99_ms),
    )
    return request.failed or any(ms is not None and limit is not None and ms > limit for ms, limit in pairs)


def p99(values: Sequence[float]) -> float | None:
    """The smallest value that 99% do not exceed."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1] if values else None
