"""The load client, which runs on vLLM's own benchmark, against a scripted engine."""

import time
from pathlib import Path
from statistics import median

import pytest
from engine_bench import DEMO
from streaming_engine import StreamingEngine, serving

from sidecar.config.schema import Workload
from sidecar.measure.load_client import LoadClient, LoadError
from sidecar.measure.requests import End, Ending, LoadProgress, LoadResult, StopRule, to_the_end
from vllm_sloguard.starts.warmup import most

pytestmark = pytest.mark.timeout(600)

MODEL = str(DEMO / "model")
LOAD = Workload(rate=50, requests=40, input_tokens=16, output_tokens=8, warmup_requests=0, request_timeout_s=20)


def send(client: LoadClient, engine: StreamingEngine, workload: Workload, watch: StopRule = to_the_end) -> LoadResult:
    return client.run(workload, engine.url, MODEL, MODEL, lambda: False, stop_rule=watch)


def test_progress_reports_every_request(client: LoadClient) -> None:
    seen: list[LoadProgress] = []
    with serving(StreamingEngine(seats=4, step_s=0.02)) as engine:
        load = send(client, engine, LOAD, seen.append)

    assert (len(load.requests), load.planned, load.cancelled, load.ending) == (40, 40, 0, None)
    assert all(len(r.itls_s) == 7 and not r.error for r in load.requests)
    # 40 requests of 8 steps of 20 ms, four at a time.
    assert load.duration_s >= 1.6
    assert median(r.e2e_s or 0 for r in load.requests) > 0.16
    assert [p.planned for p in seen] == [40] * len(seen)
    assert len(seen) >= 4
    counts = [len(p.finished) for p in seen]
    assert counts == sorted(counts)
    assert 0 < counts[-1] <= 40
    for progress in seen:
        assert set(progress.finished) <= set(load.requests)
        assert all(r.start_s + (r.ttft_s or 0) <= progress.now_s for r in progress.in_flight)


def test_a_stop_cancels_requests_in_flight(client: LoadClient) -> None:
    stopped_at = 0.0

    def stop_at_ten(progress: LoadProgress) -> Ending | None:
        nonlocal stopped_at
        if len(progress.finished) < 10:
            return None
        stopped_at = time.monotonic()
        return Ending(End.STOP, "ten are enough")

    with serving(StreamingEngine(seats=2, step_s=0.02)) as engine:
        load = send(client, engine, LOAD.model_copy(update={"requests": 400}), stop_at_ten)
        assert time.monotonic() - stopped_at < 10  # all of the load would have taken half a minute
        deadline = time.monotonic() + 10
        while engine.answered + engine.aborted < engine.arrived and time.monotonic() < deadline:
            time.sleep(0.02)
        assert engine.running == 0
        arrived = engine.arrived
        assert load.ending == Ending(End.STOP, "ten are enough")
        assert 10 <= len(load.requests) < 100
        assert load.cancelled > 10  # at 50 requests a second, of which 12 are served
        # The last one or two may have been cancelled before they arrived.
        assert len(load.requests) + load.cancelled - arrived in (0, 1, 2)
        assert engine.answered + engine.aborted == arrived
        assert engine.answered >= len(load.requests)
        assert all(not r.error for r in load.requests)

        again = send(client, engine, LOAD.model_copy(update={"requests": 10}))

    assert engine.arrived == arrived + 10  # none of the old load's requests came later
    assert (len(again.requests), again.ending) == (10, None)


def test_enough_waits_for_requests_in_flight(client: LoadClient) -> None:
    def enough(progress: LoadProgress) -> Ending | None:
        return Ending(End.ENOUGH, "seen") if len(progress.finished) >= 10 else None

    with serving(StreamingEngine(seats=4, step_s=0.02)) as engine:
        load = send(client, engine, LOAD.model_copy(update={"requests": 400}), enough)

    assert load.ending == Ending(End.ENOUGH, "seen")
    assert 10 < len(load.requests) == engine.arrived < 200
    assert (load.cancelled, engine.aborted) == (0, 0)


def test_a_warm_up_runs_until_step_times_settle(client: LoadClient) -> None:
    workload = LOAD.model_copy(update={"warmup_requests": 8, "requests": 20})
    with serving(StreamingEngine(step_s=0.05, cold=4)) as engine:
        cold = send(client, engine, workload)
        prompts = list(engine.prompts)
        warm = send(client, engine, workload.model_copy(update={"seed": 1}))

    # The first batch of four is slow, the second is not, and the third is as the second, unless the machine is busy.
    sent = cold.warm_up.requests
    assert 12 <= sent <= most(8)
    assert cold.warm_up.seconds > 8 * 0.5
    assert 8 <= warm.warm_up.requests <= most(8)
    assert median(r.ttft_s or 9 for r in cold.requests) < 0.5
    assert len(cold.requests) == 20
    # A measured request finds no prompt of the warm-up in a prefix cache; bytes that are no text all look alike here.
    texts = [{p for p in part if "\ufffd" not in p} for part in (prompts[:sent], prompts[sent:])]
    assert texts[0]
    assert not texts[0] & texts[1]


def test_a_warm_up_is_bounded(client: LoadClient) -> None:
    workload = LOAD.model_copy(update={"warmup_requests": 4, "requests": 10, "request_timeout_s": 1.0})
    with serving(StreamingEngine(step_s=5.0)) as engine:
        load = send(client, engine, workload)

    # A batch without any answer ends it; of the load, every request fails, with its reason.
    assert load.warm_up.requests == 2 < most(4)
    assert not load.warm_up.settled
    assert [r.error for r in load.requests] == ["no answer within 1 s"] * 10
    assert engine.arrived == 12


def test_short_answers_are_failures(client: LoadClient) -> None:
    with serving(StreamingEngine(short=4)) as engine:
        load = send(client, engine, LOAD)

    failed = [r for r in load.requests if r.error]
    assert len(failed) == 10
    assert {r.error for r in failed} == {"aborted after 7 of 8 tokens"}
    assert all((r.ttft_s, r.e2e_s, r.itls_s) == (None, None, ()) for r in failed)


def test_an_unsupported_workload_is_an_error_and_the_client_continues(client: LoadClient, tmp_path: Path) -> None:
    with serving(StreamingEngine()) as engine:
        with pytest.raises(LoadError, match="the benchmark client failed"):
            client.run(LOAD, engine.url, MODEL, str(tmp_path / "no-tokenizer"), lambda: False)
        assert len(send(client, engine, LOAD).requests) == 40


def test_an_engine_that_is_gone_fails_every_request(client: LoadClient) -> None:
    with serving(StreamingEngine()) as engine:
        pass
    load = send(client, engine, LOAD)

    assert len(load.requests) == 40
    assert all(r.error for r in load.requests)
