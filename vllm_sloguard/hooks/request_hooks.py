"""What happens to each request in vLLM's front end: admission, first token, preemption, end. vLLM alone imports this.

vLLM's own statistics leave out requests that clients cut and requests that were refused, and they keep no gaps by
request. The hooks here run once or twice a request, never once a token; they keep references, and the sending thread
does the arithmetic.
"""

import functools
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine import EngineCoreEventType
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import IterationStats

from vllm_sloguard.hooks import plugin

# Ends that wait to be sent; under a storm of rejections the oldest go first.
_MAX_ENDINGS = 10_000


class StepNumber:
    """Counts the steps that this process has recorded, of all its engines."""

    def __init__(self) -> None:
        self.done = 0


@dataclass(frozen=True)
class Abort:
    """A request that ended before vLLM finished it. ``state`` is vLLM's RequestState; ages are in seconds."""

    state: Any
    age_s: float
    since_token_s: float
    step: int


class FrontEnd:
    """Admissions, aborts and rejections of this process since the sending thread last asked."""

    def __init__(self) -> None:
        self.admitted = 0
        self.aborts: deque[Abort] = deque(maxlen=_MAX_ENDINGS)
        self.rejections: deque[float] = deque(maxlen=_MAX_ENDINGS)

    def take_admitted(self) -> int:
        """The sequences admitted since the last call. An admission in between may count for the next one."""
        taken = self.admitted
        self.admitted -= taken
        return taken


step_number = StepNumber()
front_end = FrontEnd()


def install() -> None:
    """Hooks vLLM's front end. Idempotent."""
    for hook in (_keep_first_step, _keep_final_stats, _count_admissions, _keep_aborts, _keep_rejections):
        plugin.harmless(hook)()


def _replace(owner: type, name: str, wrapper: Any) -> None:
    wrapper.sloguard = True
    setattr(owner, name, wrapper)


def _original(owner: type, name: str) -> Any:
    """The method to wrap; None where this vLLM lacks it, or it is wrapped already."""
    method = getattr(owner, name, None)
    return None if getattr(method, "sloguard", False) else method


def _keep_first_step() -> None:
    """Notes the step of each request's first token, and its gap across a preemption.

    vLLM calls this once with a request's first token, and again when it runs after a preemption, just before it updates
    the time of the request's last token.
    """
    original = _original(IterationStats, "update_from_events")
    preempted = EngineCoreEventType.PREEMPTED

    @functools.wraps(original)
    def update_from_events(
        self: Any, req_id: str, events: Any, is_prefilling: bool, req_stats: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(self, req_id, events, is_prefilling, req_stats, *args, **kwargs)
        try:
            if is_prefilling:
                req_stats.sloguard_first_step = step_number.done + 1
            elif any(event.type == preempted for event in events):
                self.sloguard_resumed = [*getattr(self, "sloguard_resumed", ()), (req_stats, req_stats.last_token_ts)]
        except Exception as error:  # noqa: BLE001 - the boundary to vLLM
            plugin.hook_failed("update_from_events", error)
        return result

    if original is not None:
        _replace(IterationStats, "update_from_events", update_from_events)


def _keep_final_stats() -> None:
    """Keeps a finished request's own state, which has what vLLM leaves out of its record."""
    original = _original(IterationStats, "update_from_finished_request")

    @functools.wraps(original)
    def update_from_finished_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        try:
            stats = kwargs.get("req_stats") or next(a for a in args if hasattr(a, "first_token_latency"))
            self.finished_requests[-1].sloguard_stats = stats
        except Exception as error:  # noqa: BLE001 - the boundary to vLLM
            plugin.hook_failed("update_from_finished_request", error)
        return result

    if original is not None:
        _replace(IterationStats, "update_from_finished_request", update_from_finished_request)


def _count_admissions() -> None:
    original = _original(OutputProcessor, "add_request")

    @functools.wraps(original)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        # More input for a streaming request comes this way too.
        known = request.request_id in self.request_states
        result = original(self, request, *args, **kwargs)
        front_end.admitted += not known
        return result

    if original is not None:
        _replace(OutputProcessor, "add_request", add_request)


def _keep_aborts() -> None:
    original = _original(OutputProcessor, "abort_requests")

    @functools.wraps(original)
    def abort_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = dict(self.request_states)
        aborted = original(self, *args, **kwargs)
        plugin.harmless(_aborted)(states, aborted)
        return aborted

    if original is not None:
        _replace(OutputProcessor, "abort_requests", abort_requests)


def _aborted(states: dict[str, Any], aborted: list[str]) -> None:
    for request_id in aborted:
        state = states.get(request_id)
        # vLLM calls itself for the sequences of one request, and then names them again.
        if state is None or state.stats is None or getattr(state, "sloguard_aborted", False):
            continue
        state.sloguard_aborted = True
        stats = state.stats
        since_token_s = time.monotonic() - stats.last_token_ts if stats.num_generation_tokens else 0.0
        front_end.aborts.append(Abort(state, time.time() - stats.arrival_time, since_token_s, step_number.done))


def _keep_rejections() -> None:
    """Counts requests that vLLM refuses because its queue is full; 0.26 has no such limit."""
    original = _original(AsyncLLM, "check_admission")

    @functools.wraps(original)
    def check_admission(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except Exception:
            front_end.rejections.append(time.time())
            raise

    if original is not None:
        _replace(AsyncLLM, "check_admission", check_admission)


def settle_stalls(iteration: Any) -> None:
    """Takes the gaps of requests that ran again in ``iteration``; to be called before their next token."""
    for stats, before in iteration.sloguard_resumed:
        stats.sloguard_stalls = (*getattr(stats, "sloguard_stalls", ()), stats.last_token_ts - before)
