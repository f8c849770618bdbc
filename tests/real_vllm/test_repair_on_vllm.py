"""Repair against vLLM's own checks: a small run of the benchmark."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(900)


def test_vllm_agrees_with_repair() -> None:
    ended = subprocess.run(
        [sys.executable, "benchmarks/repair.py", "--count", "150", "--seed", "3", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(ended.stdout)
    assert found["disagreements"] == []
    assert found["count"] == 150
    # All three outcomes were drawn, and every configuration that is not refused was accepted.
    assert all(found["outcomes"][status] > 10 for status in ("unchanged", "repaired", "refused"))
    assert found["accepted_repaired"] == 150 - found["outcomes"]["refused"]
    assert found["accepted_raw"] < found["accepted_repaired"]
