"""A regression visible only in ITL must be caught by trials, probation and metrics.

Every request has one stall of two seconds, while TTFT and TPOT stay within their limits.
"""

from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sidecar_cases import configured

from sidecar.config.slo import Slo
from sidecar.config.window import Probation
from sidecar.measure.measurement import measure
from sidecar.measure.requests import LoadResult, RequestResult
from sidecar.measure.verdict import slo_limits, violation
from sidecar.metrics.exporter import Metrics
from sidecar.observe.telemetry import EngineTelemetry
from sidecar.observe.user_requests import Record, summarize, user_request
from sidecar.promote.probation import ProbationVerdict, judge
from vllm_sloguard.latency import GapHistogram, percentile, tpot
from vllm_sloguard.wire import telemetry_pb2 as pb

SLO = Slo(ttft_p99_ms=500, itl_p99_ms=50, tpot_p99_ms=50)
TOKENS = 80
GOOD = (0.012,) * (TOKENS - 1)
STALLED = (*GOOD[1:], 2.0)
REQUESTS = 400


def finished(gaps_s: tuple[float, ...]) -> pb.RequestFinished:
    """The plugin's report of a request with these gaps."""
    own = {f"gap_p{share}_seconds": percentile(gaps_s, share / 100) for share in (50, 90, 95, 99)}
    return pb.RequestFinished(
        ttft_seconds=0.1,
        inter_token_seconds=tpot(gaps_s),
        e2e_seconds=0.1 + sum(gaps_s),
        prompt_tokens=500,
        output_tokens=TOKENS,
        largest_gap_seconds=max(gaps_s),
        **own,  # pyright: ignore[reportArgumentType]
    )


def record(gaps_s: tuple[float, ...]) -> Record:
    histogram = GapHistogram()
    for gap in gaps_s:
        histogram.add(gap, REQUESTS)
    return summarize([user_request(0.0, finished(gaps_s))] * REQUESTS, SLO, 4.0, histogram)


@pytest.mark.parametrize(("gaps_s", "missed"), [(GOOD, set[str]()), (STALLED, {"itl_p99_ms"})])
def test_a_trial_fails(gaps_s: tuple[float, ...], missed: set[str]) -> None:
    request = RequestResult(0.1, 0.1 + sum(gaps_s), gaps_s)
    measurement = measure(LoadResult((request,) * REQUESTS, 60.0), SLO)

    assert {limit.name for limit in slo_limits(measurement, SLO) if limit.excess} == missed
    assert (violation(measurement, SLO) > 0) == bool(missed)
    assert measurement.goodput_share == (0 if missed else 1)


@pytest.mark.parametrize(
    ("slo", "verdict"), [(SLO, ProbationVerdict.SLO_BURN), (Slo(ttft_p99_ms=500), ProbationVerdict.REGRESSION)]
)
def test_probation_rolls_back(slo: Slo, verdict: ProbationVerdict) -> None:
    """With an ITL limit it burns the error budget; without one it is slower than the incumbent."""
    requests = [[user_request(0.0, finished(gaps_s))] * REQUESTS for gaps_s in (GOOD, STALLED)]
    before = record(GOOD)

    good, stalled = (judge(before, served, 4.0, slo, Probation(), 60.0) for served in requests)

    assert good.verdict is ProbationVerdict.GOES_ON
    assert (stalled.verdict, stalled.rolls_back) == (verdict, True)


def test_the_metrics_show_it(tmp_path: Path) -> None:
    metrics = Metrics(configured(tmp_path, "slo.itl_p99_ms", 50))
    metrics.traffic("one", "serving")
    histogram = GapHistogram()
    for gap in STALLED:
        histogram.add(gap, REQUESTS)
    step = pb.StepStats(gap_buckets=list(histogram.counts), gap_counts=list(histogram.counts.values()))
    events = [pb.Event(step_stats=step), *[pb.Event(request_finished=finished(STALLED))] * REQUESTS]

    metrics.on_events(pb.PublishRequest(engine_id="one", events=events), EngineTelemetry())

    samples = {
        (sample.name, sample.labels.get("le", sample.labels.get("objective", ""))): sample.value
        for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
        for sample in family.samples
        if sample.labels.get("traffic", "serving") == "serving"
    }
    gaps = REQUESTS * (TOKENS - 1)
    assert samples["sloguard_request_itl_seconds_bucket", "1.0"] == gaps - REQUESTS
    assert samples["sloguard_request_itl_seconds_bucket", "+Inf"] == gaps
    assert samples["sloguard_slo_misses_total", "any"] == REQUESTS
