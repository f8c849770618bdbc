"""Whether users' requests meet the SLO, and the advice for a vLLM that is only watched."""

from collections.abc import Sequence

import pytest

from sidecar.config.slo import Slo
from sidecar.observe.slo_compliance import ComplianceReport, SloCompliance, compliance_report
from sidecar.observe.traffic import Traffic, TrafficRecorder
from sidecar.observe.watch_report import ADVICE_TEXTS, EngineLoadSample, WatchAdvice, advice
from vllm_sloguard.latency import GapHistogram
from vllm_sloguard.wire import telemetry_pb2 as pb

SLO = Slo(ttft_p99_ms=500.0, itl_p99_ms=60.0, e2e_mean_ms=2000.0, error_rate=0.01)
NOW = 10_000.0


def traffic_of(*requests: tuple[float, float], gap_s: float = 0.02, failed: int = 0, at: float = NOW - 10) -> Traffic:
    """``requests`` are counts with their TTFT in seconds."""
    recorder = TrafficRecorder(0.0)
    for count, ttft_s in requests:
        for _ in range(int(count)):
            finished = pb.RequestFinished(
                ttft_seconds=ttft_s, e2e_seconds=1.0, prompt_tokens=100, output_tokens=20, finish_reason="stop"
            )
            recorder.request(finished, at)
    for _ in range(failed):
        recorder.request(pb.RequestFinished(e2e_seconds=0.1, prompt_tokens=100, finish_reason="error"), at)
    gaps = GapHistogram()
    gaps.add(gap_s, 1000)
    recorder.step_gaps(pb.StepStats(gap_buckets=gaps.counts.keys(), gap_counts=gaps.counts.values()), at)
    return recorder.snapshot()


def report_of(traffic: Traffic | None) -> ComplianceReport:
    return compliance_report(traffic, NOW, SLO, over_s=900.0, min_requests=200)


@pytest.mark.parametrize(
    ("traffic", "missed"),
    [
        (traffic_of((300, 0.4)), []),
        (traffic_of((298, 0.4), (2, 9.0)), []),
        (traffic_of((290, 0.4), (10, 9.0)), ["ttft_p99_ms"]),
        (traffic_of((300, 0.4), gap_s=0.08), ["itl_p99_ms"]),
        (traffic_of((300, 0.4), failed=4), ["error_rate"]),
    ],
)
def test_each_limit_is_judged_by_its_own_statistic(traffic: Traffic, missed: list[str]) -> None:
    report = report_of(traffic)
    assert [limit.name for limit in report.limits if limit.missed] == missed
    assert report.compliance is (SloCompliance.MISSED if missed else SloCompliance.MET)


@pytest.mark.parametrize(
    "traffic", [None, traffic_of((199, 9.0)), traffic_of((1000, 9.0), at=NOW - 1000)], ids=["none", "few", "old"]
)
def test_nothing_is_concluded_from_few_or_old_requests(traffic: Traffic | None) -> None:
    assert report_of(traffic).compliance is SloCompliance.UNKNOWN


def samples(waiting: int, usage: float, preemptions: int = 0) -> Sequence[EngineLoadSample]:
    return [EngineLoadSample(waiting, usage, preemptions * number) for number in range(10)]


MET, SLOW_START, SLOW_TOKENS = (
    report_of(traffic_of((300, 0.4))),
    report_of(traffic_of((300, 0.9))),
    report_of(traffic_of((300, 0.4), gap_s=0.08)),
)


@pytest.mark.parametrize(
    ("report", "seen", "expected"),
    [
        (MET, samples(0, 0.5), ()),
        (MET, samples(3, 0.2), (WatchAdvice.QUEUE_BESIDE_FREE_CACHE,)),
        (MET, samples(3, 0.95), (WatchAdvice.QUEUE_FOR_CACHE,)),
        (MET, samples(0, 0.95, preemptions=1), (WatchAdvice.PREEMPTIONS,)),
        (SLOW_START, samples(0, 0.5), (WatchAdvice.SLOW_PREFILL, WatchAdvice.TUNING_MAY_HELP)),
        (SLOW_START, samples(3, 0.5), (WatchAdvice.QUEUE_BESIDE_FREE_CACHE, WatchAdvice.TUNING_MAY_HELP)),
        (SLOW_TOKENS, samples(0, 0.5), (WatchAdvice.SLOW_TOKENS, WatchAdvice.TUNING_MAY_HELP)),
    ],
)
def test_advice_follows_from_the_queue_the_cache_and_the_limits(
    report: ComplianceReport, seen: Sequence[EngineLoadSample], expected: tuple[WatchAdvice, ...]
) -> None:
    assert advice(report, seen, telemetry=True) == expected


def test_without_telemetry_the_only_advice_is_how_to_get_it() -> None:
    assert advice(report_of(None), (), telemetry=False) == (WatchAdvice.NO_TELEMETRY,)
    assert set(ADVICE_TEXTS) == set(WatchAdvice)
