"""The load client keeps its times on a machine whose every core is busy with the engine."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from own_ports import own_port
from pydantic import TypeAdapter

from vllm_sloguard.latency import percentile
from vllm_sloguard.starts.load_protocol import LoadReport

pytest.importorskip("httptools")
pytest.importorskip("uvloop")

SUPPORT = Path(__file__).resolve().parents[2] / "support"
RATE, COUNT, TOKENS, STEP_S = 30.0, 150, 32, 0.01
LATEST_S = 0.05


@pytest.fixture
def engine() -> Iterator[str]:
    """The URL of an engine that spins on all cores and makes a token every STEP_S."""
    port = own_port()
    command = [sys.executable, str(SUPPORT / "spinning_engine.py"), str(port), str(os.cpu_count()), str(STEP_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"ready\n"
        yield f"http://127.0.0.1:{port}"
        started.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="how late depends on the kernel where only root may choose the policy")
def test_requests_are_sent_in_time_and_tokens_timed_right(engine: str) -> None:
    command = [sys.executable, str(SUPPORT / "paced_load.py"), engine, str(RATE), str(COUNT), str(TOKENS)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=True)
    report = TypeAdapter(LoadReport).validate_json(done.stdout)

    assert [r.error for r in report.requests if r.error] == []
    lags = [r.start_s - r.intended_s for r in report.requests if r.start_s is not None and r.intended_s is not None]
    assert len(lags) == COUNT
    assert min(lags) >= 0
    assert (percentile(lags, 0.99) or 0) <= LATEST_S
    # The engine's own sleeps are never shorter than its step.
    assert {len(r.itls_s) for r in report.requests} == {TOKENS - 1}
    assert STEP_S <= median(gap for r in report.requests for gap in r.itls_s) <= 3 * STEP_S
    assert all(r.e2e_s and r.e2e_s >= 0.9 * TOKENS * STEP_S for r in report.requests)
    assert report.duration_s <= time.monotonic() - began
