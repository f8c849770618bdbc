"""The service's own requests, from what the plugin tells of them."""

from sidecar.probation import Request
from sidecar.telemetry import Traffic
from vllm_sloguard.wire import telemetry_pb2 as pb

# What a window's ceiling is compared with.
RATE_OVER_S = 300.0
# The sidecar's own probe: "a", and one token.
_PROBE_PROMPT_TOKENS, _PROBE_OUTPUT_TOKENS = 2, 1


def real_requests(traffic: Traffic | None) -> list[Request]:
    """Without the sidecar's probes, and without what a client has given up."""
    heard = traffic.requests if traffic is not None else ()
    return [_request(at, r) for at, r in heard if r.finish_reason != "abort" and not _is_probe(r)]


def _is_probe(request: pb.RequestFinished) -> bool:
    return request.prompt_tokens <= _PROBE_PROMPT_TOKENS and request.output_tokens <= _PROBE_OUTPUT_TOKENS


def _request(at: float, request: pb.RequestFinished) -> Request:
    return Request(
        at,
        request.ttft_seconds * 1000 if request.HasField("ttft_seconds") else None,
        request.inter_token_seconds * 1000 if request.HasField("inter_token_seconds") else None,
        request.e2e_seconds * 1000,
        request.prompt_tokens,
        request.output_tokens,
        failed=request.finish_reason == "error",
    )
