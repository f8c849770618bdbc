"""An engine's traffic: the measured rate is exact under any load, and memory is bounded."""

import psutil
import pytest

from sidecar.observe.telemetry import EngineTelemetry, TelemetryHub
from sidecar.observe.traffic import SampledRequest, Traffic, TrafficRecorder
from sidecar.observe.user_requests import RATE_OVER_S, rate, real_requests
from vllm_sloguard.latency import GapHistogram
from vllm_sloguard.wire import telemetry_pb2 as pb


def finished(ttft_s: float = 0.1, reason: str = "stop", tokens: int = 64) -> pb.RequestFinished:
    return pb.RequestFinished(
        ttft_seconds=ttft_s, e2e_seconds=2 * ttft_s, prompt_tokens=tokens, output_tokens=tokens, finish_reason=reason
    )


def gaps(*values_s: float) -> pb.StepStats:
    histogram = GapHistogram()
    for value in values_s:
        histogram.add(value)
    return pb.StepStats(gap_buckets=histogram.counts.keys(), gap_counts=histogram.counts.values())


@pytest.mark.parametrize("per_s", [0.01, 1.0, 50.0, 167.0, 200.0, 2000.0])
def test_the_rate_is_right_at_every_rate(per_s: float) -> None:
    recorder, seconds = TrafficRecorder(0.0), 400.0
    for number in range(int(per_s * seconds)):
        recorder.request(finished(), number / per_s)

    found = rate(recorder.snapshot(), seconds, RATE_OVER_S)
    assert found == pytest.approx(per_s, rel=0.01, abs=1 / RATE_OVER_S)


def test_the_rate_is_unknown_in_the_first_minute_and_falls_to_zero() -> None:
    recorder = TrafficRecorder(0.0)
    for second in range(1000):
        recorder.request(finished(), float(second))
    traffic = recorder.snapshot()

    assert rate(traffic, 59.0, RATE_OVER_S) is None
    assert rate(traffic, 999.0, RATE_OVER_S) == pytest.approx(1.0)
    assert rate(traffic, 2000.0, RATE_OVER_S) == 0.0


def test_rejected_and_aborted_requests_are_traffic_and_probes_are_not() -> None:
    recorder = TrafficRecorder(0.0)
    recorder.request(finished(reason="abort"), 1.0)
    recorder.request(pb.RequestFinished(finish_reason="rejected"), 1.0)
    recorder.request(finished(tokens=1), 1.0)

    assert rate(recorder.snapshot(), 100.0, RATE_OVER_S) == pytest.approx(0.02)
    assert [r.failed for r in real_requests(recorder.snapshot())] == [False, True]


def test_a_sample_of_many_requests_is_bounded_and_has_their_distribution() -> None:
    recorder = TrafficRecorder(0.0, most_sampled=2000)
    for number in range(100_000):
        recorder.request(finished(ttft_s=number % 100 / 100), number / 1000)
    traffic = recorder.snapshot()

    assert 1000 <= len(traffic.requests) <= 2000
    assert traffic.sampled_share < 1
    slow = sum(sampled.request.ttft_seconds >= 0.9 for sampled in traffic.requests) / len(traffic.requests)
    assert slow == pytest.approx(0.1, abs=0.03)
    early = sum(at < 50 for at, _ in traffic.requests) / len(traffic.requests)
    assert early == pytest.approx(0.5, abs=0.05)


def test_a_sample_does_not_keep_the_batches_that_it_came_in() -> None:
    """A message inside another one keeps the memory of both: 40 MiB here."""
    batch = pb.PublishRequest(events=[pb.Event(request_finished=finished()) for _ in range(1000)]).SerializeToString()
    recorder, me = TrafficRecorder(0.0, most_sampled=1000), psutil.Process()
    before = me.memory_info().rss
    for number in range(200):
        for event in pb.PublishRequest.FromString(batch).events:
            recorder.request(event.request_finished, float(number))

    assert len(recorder.requests) >= 500
    assert me.memory_info().rss - before < 10 * 2**20


def test_only_the_last_engines_keep_their_requests() -> None:
    hub = TelemetryHub()
    for name in "abcd":
        hub.expect(name)
        hub.of(name).add(pb.Event(request_finished=finished()))

    assert [len(hub.of(name).requests) for name in "abcd"] == [0, 1, 1, 1]
    assert hub.of("a").recorder.ended == 1


def test_every_request_is_kept_again_after_a_burst() -> None:
    recorder = TrafficRecorder(0.0, most_sampled=100)
    for number in range(10_000):
        recorder.request(finished(), number / 1000)
    for number in range(100):
        recorder.request(finished(), 5000.0 + number)

    assert recorder.snapshot().sampled_share == 1


def test_recent_gaps_are_kept_apart_from_older_ones() -> None:
    recorder = TrafficRecorder(0.0)
    recorder.step_gaps(gaps(2.0), 0.0)
    recorder.step_gaps(gaps(0.01, 0.01), 100.0)
    recorder.step_gaps(gaps(0.01), 101.0)
    traffic = recorder.snapshot()

    assert traffic.gaps_after(0.0).over(1.0) == 1
    assert (traffic.gaps_after(50.0).over(1.0), traffic.gaps_after(50.0).n) == (0, 3)
    recorder.step_gaps(gaps(0.01), 102.0)
    assert traffic.gaps_after(50.0).n == 3  # a snapshot does not change


def test_old_gaps_and_requests_are_forgotten() -> None:
    recorder = TrafficRecorder(0.0)
    for at in (0.0, 4000.0):
        recorder.step_gaps(gaps(0.01), at)
        recorder.request(finished(), at)

    assert len(recorder.snapshot().requests) == 1
    assert recorder.snapshot().gaps_after(0.0).n == 1


def test_no_bucket_breaks_the_percentile() -> None:
    recorder = TrafficRecorder(0.0)
    recorder.step_gaps(pb.StepStats(gap_buckets=[2**31 - 1, -(2**31), 5], gap_counts=[1, 1]), 0.0)

    assert recorder.snapshot().gaps_after(0.0).percentile(0.99) is not None


def test_levels_are_sums_and_maxima_over_the_ranks() -> None:
    engine = EngineTelemetry()
    for rank, running, usage in ((0, 5, 0.9), (1, 3, 0.2), (0, 4, 0.8)):
        stats = pb.StepStats(
            engine_index=rank, running_requests=running, waiting_requests=1, kv_cache_usage=usage, steps=1
        )
        engine.add(pb.Event(step_stats=stats))

    assert (engine.levels.running_requests, engine.levels.waiting_requests) == (7, 2)
    assert engine.levels.kv_cache_usage == pytest.approx(0.8)
    assert engine.total_steps == 3


def test_admitted_requests_are_open_until_they_end() -> None:
    engine = EngineTelemetry()
    engine.add(pb.Event(admission_counts=pb.AdmissionCounts(admitted=3)))
    engine.add(pb.Event(request_finished=finished(reason="abort")))
    engine.add(pb.Event(request_finished=pb.RequestFinished(finish_reason="rejected")))

    assert engine.open_requests == 2


def test_a_traffic_without_counts_is_counted_by_its_requests() -> None:
    requests = tuple(SampledRequest.of(float(at), finished()) for at in range(100))
    assert rate(Traffic(0.0, requests), 100.0, RATE_OVER_S) == pytest.approx(0.99)
