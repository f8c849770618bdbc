"""Malformed output of the load client: a one-line load error, or a result that can be judged."""

import json
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from malformed import broken_bytes, broken_values, fuzzed, took

from sidecar.config.schema import Objective, Workload
from sidecar.config.slo import Slo
from sidecar.measure import verdict
from sidecar.measure.load_client import LoadClient, LoadError
from sidecar.measure.measurement import measure

CLIENT = f"""#!{sys.executable}
import sys
from pathlib import Path
print('{{"type": "ready"}}', flush=True)
for _ in sys.stdin:
    sys.stdout.buffer.write(Path(__file__).with_name("answer").read_bytes() + b"\\n")
    sys.stdout.buffer.flush()
"""
REQUESTS: list[dict[str, Any]] = [
    {"ttft_s": 0.1, "e2e_s": 0.2, "itls_s": [0.01], "error": "", "start_s": 0.5, "intended_s": 0.5},
    {"ttft_s": 0.2, "e2e_s": 0.3, "itls_s": [], "error": "", "start_s": 1.5, "intended_s": None},
    {"ttft_s": None, "e2e_s": None, "itls_s": [], "error": "late", "start_s": None, "intended_s": None},
]
GOOD: dict[str, Any] = {"type": "report", "requests": REQUESTS, "duration_s": 1.0, "planned": 3, "cancelled": 0}


@dataclass(frozen=True)
class Told:
    """A client that replies with the content of the file ``answer``."""

    client: LoadClient
    answer: Path


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Generator[Told]:
    """One client for the module; it is restarted after an unreadable reply."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "client").write_text(CLIENT)
    (folder / "client").chmod(0o700)
    client = LoadClient(str(folder / "client"), folder / "log", {})
    yield Told(client, folder / "answer")
    client.close()


@fuzzed
@given(
    st.one_of(
        broken_bytes(json.dumps(GOOD).encode()), broken_values(GOOD).map(lambda answer: json.dumps(answer).encode())
    )
)
def test_answers(told: Told, content: bytes) -> None:
    # One line is one answer; of more, the rest would be another one's.
    told.answer.write_bytes(b" ".join(content.splitlines()) or b"-")

    def attempt() -> None:
        load = told.client.run(Workload(rate=4, requests=10), "http://127.0.0.1:1", "m", "m", lambda: False)
        slo = Slo(e2e_p99_ms=5)
        measurement = measure(load, slo)
        verdict.violation(measurement, slo)
        verdict.value(measurement, Objective.LATENCY, ())
        verdict.scores(load, slo, Objective.LATENCY)

    took("load client's answer", attempt, LoadError)
