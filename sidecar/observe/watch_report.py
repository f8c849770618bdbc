"""What is reported of a vLLM that is only watched (``engine.watch_only``), and the advice that follows. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pydantic import TypeAdapter

from sidecar.config.slo import LATENCY_STATISTICS, LatencyKind
from sidecar.observe.slo_compliance import ComplianceReport, SloCompliance

# In the state folder.
WATCH_REPORT_FILE = "watched.json"
_KIND_OF = {statistic.name: statistic.kind for statistic in LATENCY_STATISTICS}
# Shares of the samples, and of the KV cache.
_OFTEN, _FULL = 0.1, 0.9


class WatchAdvice(StrEnum):
    """Advice for whoever runs the watched vLLM."""

    NO_TELEMETRY = "no_telemetry"
    QUEUE_BESIDE_FREE_CACHE = "queue_beside_free_cache"
    QUEUE_FOR_CACHE = "queue_for_cache"
    PREEMPTIONS = "preemptions"
    SLOW_TOKENS = "slow_tokens"
    SLOW_PREFILL = "slow_prefill"
    TUNING_MAY_HELP = "tuning_may_help"


ADVICE_TEXTS = {
    WatchAdvice.NO_TELEMETRY: (
        "no telemetry: start vLLM where vllm-sloguard is installed, with SLOGUARD_SOCKET set to the sidecar.sock of"
        " this state folder and without SLOGUARD_ENGINE_ID"
    ),
    WatchAdvice.QUEUE_BESIDE_FREE_CACHE: "requests wait although the KV cache has room: raise max_num_seqs",
    WatchAdvice.QUEUE_FOR_CACHE: (
        "requests wait for the KV cache: raise gpu_memory_utilization, lower max_model_len, or add an instance"
    ),
    WatchAdvice.PREEMPTIONS: (
        "requests are preempted because the KV cache is full: lower max_num_seqs, or raise gpu_memory_utilization"
    ),
    WatchAdvice.SLOW_TOKENS: "tokens are too slow: lower max_num_seqs or max_num_batched_tokens",
    WatchAdvice.SLOW_PREFILL: (
        "first tokens are too slow and no request waits for a place: raise max_num_batched_tokens"
    ),
    WatchAdvice.TUNING_MAY_HELP: (
        "the SLO is missed: with an agent, a tuning window could look for a configuration that meets it"
    ),
}


@dataclass(frozen=True)
class EngineLoadSample:
    """The scheduler at one moment: requests waiting, KV cache usage (0 to 1), preemptions since the engine's start."""

    waiting_requests: int
    kv_cache_usage: float
    preemptions: int


@dataclass(frozen=True)
class WatchReport:
    """What is known at ``at``, seconds since the epoch; ``telemetry``: the plugin has reported something."""

    at: float
    address: str
    answers: bool
    telemetry: bool
    compliance: ComplianceReport
    advice: tuple[WatchAdvice, ...]


WATCH_REPORT: TypeAdapter[WatchReport] = TypeAdapter(WatchReport)


def advice(
    report: ComplianceReport, samples: Sequence[EngineLoadSample], *, telemetry: bool
) -> tuple[WatchAdvice, ...]:
    """The advice for what was reported; ``samples`` are those of the same time, oldest first."""
    if not telemetry:
        return (WatchAdvice.NO_TELEMETRY,)
    found: list[WatchAdvice] = []
    waiting = [sample for sample in samples if sample.waiting_requests]
    queue = len(waiting) > _OFTEN * len(samples)
    if queue:
        full = sum(sample.kv_cache_usage >= _FULL for sample in waiting) * 2 > len(waiting)
        found.append(WatchAdvice.QUEUE_FOR_CACHE if full else WatchAdvice.QUEUE_BESIDE_FREE_CACHE)
    if samples and samples[-1].preemptions > samples[0].preemptions:
        found.append(WatchAdvice.PREEMPTIONS)
    if report.compliance is SloCompliance.MISSED:
        missed = {_KIND_OF.get(limit.name) for limit in report.limits if limit.missed}
        if missed & {LatencyKind.ITL, LatencyKind.TPOT}:
            found.append(WatchAdvice.SLOW_TOKENS)
        if LatencyKind.TTFT in missed and not queue:
            found.append(WatchAdvice.SLOW_PREFILL)
        found.append(WatchAdvice.TUNING_MAY_HELP)
    return tuple(found)
