"""A scheduler with vLLM's fields and its rules for admission, token budget and prefix caching."""

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass
class Request:
    """A request: prompt tokens left, then output tokens, one per step."""

    prompt: int
    output: int


@dataclass
class Output:
    """The fields of vLLM's SchedulerOutput that the plugin reads."""

    scheduled_new_reqs: list[Request] = field(default_factory=list[Request])
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict[str, int])
    total_num_scheduled_tokens: int = 0


class FakeScheduler:
    """A small vllm/v1/core/sched/scheduler.py; ``separate_limit``: as in 0.32, else as in 0.26."""

    def __init__(self, seqs: int = 16, tokens: int = 1024, *, separate_limit: bool = True) -> None:
        self.max_num_running_reqs = seqs
        if separate_limit:
            self.max_num_active_reqs = seqs
        self.max_num_scheduled_tokens = tokens
        self.max_model_len = 1024
        self.num_spec_tokens = 0
        self.scheduler_reserve_full_isl = True
        self.need_mamba_block_aligned_split = self.has_mamba_layers = False
        self.connector = None
        self.scheduler_config = SimpleNamespace(
            max_num_batched_tokens=tokens, long_prefill_token_threshold=0, enable_chunked_prefill=True
        )
        model = SimpleNamespace(is_multimodal_model=False, runner_type="generate")
        self.vllm_config = SimpleNamespace(
            model_config=model, speculative_config=None, attention_config=SimpleNamespace(hisparse_config=None)
        )
        group = SimpleNamespace(enable_caching=True)
        self.kv_cache_manager = KvCacheManager(SimpleNamespace(single_type_managers=(group,)))
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.resets = 0

    def get_request_counts(self) -> tuple[int, int]:
        return len(self.running), len(self.waiting)

    def reset_prefix_cache(self, reset_connector: bool = False) -> bool:
        assert not reset_connector
        assert not self.running
        self.resets += 1
        return True

    def schedule(self) -> Output:
        output, budget = Output(), self.max_num_scheduled_tokens
        for request in self.running:
            budget -= self._take(request, budget, output)
        while budget > 0 and self.waiting:
            if len(self.running) >= getattr(self, "max_num_active_reqs", self.max_num_running_reqs):
                break
            request = self.waiting.popleft()
            self.running.append(request)
            self.kv_cache_manager.look_up(request)
            self.kv_cache_manager.allocate_slots(full_sequence_must_fit=self.scheduler_reserve_full_isl)
            output.scheduled_new_reqs.append(request)
            budget -= self._take(request, budget, output)
        # As vLLM asserts it: without that a limit below what runs would go unseen.
        assert len(self.running) <= self.max_num_running_reqs
        assert output.total_num_scheduled_tokens <= self.max_num_scheduled_tokens
        self.running = [request for request in self.running if request.prompt or request.output]
        return output

    def _take(self, request: Request, budget: int, output: Output) -> int:
        if budget <= 0:
            return 0
        threshold = self.scheduler_config.long_prefill_token_threshold
        if request.prompt:
            taken = min(request.prompt, budget, threshold or budget)
            request.prompt -= taken
        else:
            taken = 1
            request.output -= 1
        output.num_scheduled_tokens[str(id(request))] = taken
        output.total_num_scheduled_tokens += taken
        return taken


@dataclass
class KvCacheManager:
    """The prefix cache's switches and statistics."""

    coordinator: Any
    enable_caching: bool = True
    prefix_cache_stats: Any = field(
        default_factory=lambda: SimpleNamespace(requests=0, preempted_requests=0, queries=0, hits=0)
    )
    asked: list[bool] = field(default_factory=list[bool])

    def look_up(self, request: Request) -> None:
        if self.enable_caching:
            self.prefix_cache_stats.requests += 1
            self.prefix_cache_stats.queries += request.prompt

    def allocate_slots(self, *, full_sequence_must_fit: bool) -> None:
        self.asked.append(full_sequence_must_fit)
