"""The hooks of requests on vLLM's own front-end classes, without an engine: each request ends in exactly one event."""

from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stat logger of an engine, and with it the hooks."""
    from vllm_sloguard.hooks import plugin, stat_logger
    from vllm_sloguard.hooks.settings import Settings
    from vllm_sloguard.hooks.telemetry_client import TelemetryClient

    client = TelemetryClient(Settings(socket="/nonexistent", engine_id="one"))
    monkeypatch.setattr(plugin, "_link", client)
    monkeypatch.setattr(stat_logger, "_loggers", [])
    created: Any = stat_logger.SloguardStatLogger(None, 0)  # pyright: ignore[reportArgumentType]
    _taken(created)
    yield created
    assert client.hook_errors == 0


class FrontEndBench:
    """vLLM's OutputProcessor, fed by hand; ``now`` is the engine's clock."""

    def __init__(self, logger: Any) -> None:
        from vllm.v1.engine.output_processor import OutputProcessor

        self.logger, self.now = logger, 1000.0
        self.processor = OutputProcessor(None, log_stats=True)

    def admit(self, name: str) -> None:
        import time

        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        params = SamplingParams(max_tokens=100, detokenize=False)
        request = EngineCoreRequest(
            request_id=name, prompt_token_ids=[1, 2, 3, 4], mm_features=None, sampling_params=params,
            pooling_params=None, arrival_time=time.time(), lora_request=None, cache_salt=None, data_parallel_rank=None,
        )  # fmt: skip
        request.external_req_id = name
        self.processor.add_request(request, None)

    def step(self, gap_s: float, *names: str, first: bool = False, resumed: str = "", finished: str = "") -> None:
        from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
        from vllm.v1.metrics.stats import IterationStats, SchedulerStats

        self.now += gap_s
        iteration = IterationStats()
        outputs: list[Any] = []
        for name in names:
            kinds = [EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED] if first else []
            if name == resumed:
                kinds = [EngineCoreEventType.PREEMPTED, EngineCoreEventType.SCHEDULED]
            events = [EngineCoreEvent.new_event(kind, self.now) for kind in kinds] or None
            reason = FinishReason.LENGTH if name == finished else None
            outputs.append(EngineCoreOutput(request_id=name, new_token_ids=[7], finish_reason=reason, events=events))
        self.processor.process_outputs(outputs, self.now, iteration)
        self.logger.record(SchedulerStats(num_running_reqs=len(names)), iteration)


def _taken(logger: Any) -> list[Any]:
    """What the sending thread would send now."""
    return [*logger.digest(), *logger.totals()]


def ended(events: list[Any]) -> list[Any]:
    return [e.request_finished for e in events if e.WhichOneof("kind") == "request_finished"]


def test_each_request_s_gaps_and_the_gaps_of_all(logger: Any) -> None:
    bench = FrontEndBench(logger)
    bench.admit("a")
    bench.admit("b")
    bench.step(0.5, "a", "b", first=True)
    bench.step(0.02, "a", "b")
    bench.step(0.02, "a")  # b is preempted
    bench.step(0.02, "a", "b", resumed="b")
    bench.step(2.0, "b", "a", finished="a")
    bench.step(0.02, "b", finished="b")
    events = _taken(logger)

    a, b = ended(events)
    assert (a.output_tokens, b.output_tokens) == (5, 5)
    assert (a.largest_gap_seconds, b.largest_gap_seconds) == pytest.approx((2.0, 2.0))
    assert (a.gap_p50_seconds, b.gap_p50_seconds) == pytest.approx((0.02, 0.02))
    steps = next(e.step_stats for e in events if e.WhichOneof("kind") == "step_stats")
    assert (steps.steps, steps.generated_tokens, sum(steps.gap_counts)) == (6, 10, 8)
    admitted = [e.admission_counts.admitted for e in events if e.WhichOneof("kind") == "admission_counts"]
    assert admitted == [2]


def test_a_preemption_is_in_the_gaps_of_its_request_alone(logger: Any) -> None:
    bench = FrontEndBench(logger)
    for name in ("a", "b"):
        bench.admit(name)
    bench.step(0.5, "a", "b", first=True)
    bench.step(0.02, "a", "b")
    for _ in range(50):
        bench.step(0.02, "a")
    bench.step(0.02, "a", "b", resumed="b")
    bench.step(0.02, "a", "b", finished="b")
    bench.step(0.02, "a", finished="a")
    b, a = ended(_taken(logger))

    assert b.largest_gap_seconds == pytest.approx(51 * 0.02)
    assert a.largest_gap_seconds < 0.5  # the front end itself may lag


def test_requests_that_clients_cut_end_in_one_event_with_their_age(logger: Any) -> None:
    bench = FrontEndBench(logger)
    for name in ("waits", "runs", "done"):
        bench.admit(name)
    bench.step(0.1, "runs", "done", first=True)
    bench.step(0.1, "runs", "done", finished="done")
    bench.processor.request_states["waits"].stats.arrival_time -= 60  # pyright: ignore[reportOptionalMemberAccess]
    for name in ("waits", "runs", "done", "unknown"):
        bench.processor.abort_requests([name], internal=False)
    requests = {r.finish_reason + str(r.output_tokens): r for r in ended(_taken(logger))}

    assert sorted(requests) == ["abort0", "abort2", "length2"]
    assert requests["abort0"].e2e_seconds == pytest.approx(60, abs=5)
    assert not requests["abort0"].HasField("ttft_seconds")
    assert requests["abort2"].HasField("ttft_seconds")
    assert ended(_taken(logger)) == []
