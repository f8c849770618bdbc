"""Which user requests miss the SLO, and the record of many of them."""

import pytest

from sidecar.config.slo import Slo
from sidecar.observe.user_requests import RECORD, OwnItls, UserRequest, judged, missed_slo, summarize, user_request
from vllm_sloguard.latency import GapHistogram
from vllm_sloguard.wire import telemetry_pb2 as pb

ITL, TPOT, TTFT = Slo(itl_p99_ms=50), Slo(tpot_p99_ms=50), Slo(ttft_p99_ms=500)


def with_gaps(p99_ms: float, largest_ms: float, tpot_ms: float = 20.0) -> UserRequest:
    return UserRequest(0.0, 100.0, tpot_ms, 3000.0, 500, 128, itl=OwnItls(20.0, 20.0, 20.0, p99_ms, largest_ms))


def aborted(age_ms: float, ttft_ms: float | None = None) -> UserRequest:
    return UserRequest(0.0, ttft_ms, None, age_ms, 500, 0 if ttft_ms is None else 5, aborted=True)


@pytest.mark.parametrize(
    ("slo", "request_", "expected"),
    [
        (ITL, with_gaps(p99_ms=50.0, largest_ms=400.0), False),
        (ITL, with_gaps(p99_ms=51.0, largest_ms=51.0), True),
        (ITL, with_gaps(p99_ms=20.0, largest_ms=2000.0), True),  # one stall of two seconds
        (TPOT, with_gaps(p99_ms=2000.0, largest_ms=2000.0, tpot_ms=50.0), False),
        (TPOT, with_gaps(p99_ms=20.0, largest_ms=20.0, tpot_ms=51.0), True),
        (ITL, UserRequest(0.0, 1.0, 51.0, 1.0, 500, 128), True),  # a plugin that reports no gaps
        (Slo(itl_p90_ms=50), with_gaps(p99_ms=60.0, largest_ms=60.0), False),
        (TTFT, aborted(501.0), True),
        (TTFT, aborted(499.0), False),
        (TTFT, aborted(5000.0, ttft_ms=100.0), False),
        (Slo(e2e_p99_ms=4000), aborted(5000.0, ttft_ms=100.0), True),
    ],
)
def test_a_miss(slo: Slo, request_: UserRequest, *, expected: bool) -> None:
    assert missed_slo(request_, slo) is expected


def test_a_quick_abort_is_counted_apart_and_a_late_one_is_a_miss() -> None:
    requests = [UserRequest(0.0, 100.0, 20.0, 900.0, 500, 100), aborted(100.0), aborted(9000.0)]
    record = summarize(requests, TTFT, 1.0)

    assert (record.requests, record.missed, record.aborted) == (2, 1, 1)
    assert record.ttft_p99_ms == 9000.0  # it had waited that long
    assert judged(requests, TTFT) == [requests[0], requests[2]]


def test_a_rejected_request_is_an_error() -> None:
    rejected = user_request(0.0, pb.RequestFinished(finish_reason="rejected"))
    record = summarize([rejected], TTFT, 1.0)

    assert (record.requests, record.failed, record.missed) == (1, 1, 1)


def test_itl_is_over_all_gaps_and_tpot_over_requests() -> None:
    gaps = GapHistogram()
    gaps.add(0.02, 980)
    gaps.add(2.0, 20)
    record = summarize([with_gaps(20.0, 2000.0, tpot_ms=60.0)] * 20, ITL, 1.0, gaps)

    assert record.itl_p99_ms == pytest.approx(2000.0, rel=0.02)
    assert record.tpot_p99_ms == 60.0
    assert summarize([], ITL, None).itl_p99_ms is None


def test_the_gaps_of_a_request_come_from_the_plugin() -> None:
    request = user_request(
        1.0,
        pb.RequestFinished(
            inter_token_seconds=0.03, largest_gap_seconds=2.0, gap_p50_seconds=0.02, gap_p99_seconds=0.5
        ),
    )
    assert (request.tpot_ms, request.largest_gap_ms) == (30.0, 2000.0)
    assert request.itl == OwnItls(20.0, 0.0, 0.0, 500.0, 2000.0)


def test_records_of_earlier_versions_stored_tpot_as_itl() -> None:
    stored = {
        "requests": 9, "missed": 0, "rate": 1.0, "prompt_tokens": 1.0, "output_tokens": 1.0, "ttft_p99_ms": 5.0,
        "itl_p99_ms": 7.0,
    }  # fmt: skip
    record = RECORD.validate_python(stored)
    assert (record.itl_p99_ms, record.tpot_p99_ms) == (None, 7.0)
    assert RECORD.validate_json(RECORD.dump_json(record)) == record
