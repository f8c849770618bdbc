"""Telemetry of requests, from vLLM's records of them. Runs in the sending thread."""

from typing import Any

from vllm_sloguard.hooks.step_log import OwnGaps, StepLog
from vllm_sloguard.wire import telemetry_pb2 as pb

_REJECTED = "rejected"


def finished_event(request: Any, steps: StepLog, step: int) -> pb.Event:
    """``request`` is vLLM's FinishedRequestStats, which ended in the step ``step``."""
    tokens, decode_s = request.num_generation_tokens, request.decode_time
    stats = getattr(request, "sloguard_stats", None)
    # Set in place: a message given to another's constructor is copied.
    event = pb.Event()
    finished = event.request_finished
    if tokens:
        finished.ttft_seconds = getattr(stats, "first_token_latency", None) or request.e2e_latency - decode_s
    if tokens > 1:
        finished.inter_token_seconds = decode_s / (tokens - 1)
    finished.e2e_seconds = request.e2e_latency
    finished.queue_seconds = max(request.queued_time, 0.0)
    finished.prefill_seconds = max(request.prefill_time, 0.0)
    finished.decode_seconds = max(decode_s, 0.0)
    finished.prompt_tokens = request.num_prompt_tokens
    finished.output_tokens = tokens
    finished.finish_reason = str(request.finish_reason)
    _set_gaps(finished, _own_gaps(stats, steps, step, tokens))
    return event


def aborted_event(abort: Any, steps: StepLog | None) -> pb.Event:
    """``abort`` is an Abort. Of its request everything counts up to the abort, the wait for the next token too."""
    state, stats = abort.state, abort.state.stats
    tokens = stats.num_generation_tokens
    decode_s = max(stats.last_token_ts - stats.first_token_ts, 0.0) if tokens else 0.0
    event = pb.Event(
        request_finished=pb.RequestFinished(
            ttft_seconds=stats.first_token_latency if tokens else None,
            inter_token_seconds=decode_s / (tokens - 1) if tokens > 1 else None,
            e2e_seconds=max(abort.age_s, 0.0),
            queue_seconds=max(stats.scheduled_ts - stats.queued_ts, 0.0) if stats.scheduled_ts else 0.0,
            prefill_seconds=max(stats.first_token_ts - stats.scheduled_ts, 0.0) if tokens else 0.0,
            decode_seconds=decode_s,
            prompt_tokens=state.prompt_len,
            output_tokens=tokens,
            finish_reason="abort",
        )
    )
    if tokens:
        finished = event.request_finished
        _set_gaps(finished, _own_gaps(stats, steps, abort.step, tokens) if steps is not None else None)
        open_gap_s = min(max(abort.since_token_s, 0.0), abort.age_s)
        finished.largest_gap_seconds = max(finished.largest_gap_seconds, open_gap_s)
        if tokens < 100 or steps is None:  # the largest of fewer than 100 gaps is their 99th percentile
            finished.gap_p99_seconds = finished.largest_gap_seconds
    return event


def rejected_event(at: float) -> pb.Event:
    """A request that was refused at ``at``, seconds since the epoch."""
    return pb.Event(time_unix_seconds=at, request_finished=pb.RequestFinished(finish_reason=_REJECTED))


def _own_gaps(stats: Any, steps: StepLog, step: int, tokens: int) -> OwnGaps | None:
    first = getattr(stats, "sloguard_first_step", None)
    if first is None or tokens < 2:
        return None
    return steps.own_gaps(first, step, getattr(stats, "sloguard_stalls", ()))


def _set_gaps(finished: pb.RequestFinished, own: OwnGaps | None) -> None:
    if own is None:
        return
    finished.gap_p50_seconds = own.p50_s
    finished.gap_p90_seconds = own.p90_s
    finished.gap_p95_seconds = own.p95_s
    finished.gap_p99_seconds = own.p99_s
    finished.largest_gap_seconds = own.largest_s
