"""`sloguard diagnose`: what it prints of a file and of standard input, its JSON and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

from vllm_logs import engine_dead, prefixed, serving, start_failed, traceback, v1

COMMAND = [sys.executable, "-m", "sidecar", "diagnose"]
TAKEN = (
    "ValueError: Free memory on device cuda:0 (38.69/139.8 GiB) on startup is less than desired GPU memory utilization"
    " (0.95, 132.81 GiB)."
)


def run(*args: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *args], input=text, capture_output=True, text=True, check=False, timeout=120)


def test_a_log_of_compose_from_standard_input() -> None:
    log = prefixed("vllm-1  | ", f"{v1('EngineCore_DP0', traceback(TAKEN))}\n{start_failed()}")
    done = run("-", text=log)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "out_of_memory, while starting: GPU memory taken by others",
        f"line 4, EngineCore_DP0: {TAKEN}",
    ]
    assert "  - gpu_memory_utilization: at most 0.27 (38.69 of 139.8 GiB were free)" in done.stdout
    assert "docs/crashes.md#gpu-memory-taken-by-others" in done.stdout


def test_json_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "vllm.log"
    died = v1("Worker_TP1", traceback("AssertionError: tokens"), source="multiproc_executor.py:596")
    path.write_bytes(f"{serving()}\r\n{died}\n{engine_dead()}\xff".encode("latin-1"))
    found = json.loads(run(str(path), "--json").stdout)
    assert found["changes"]
    assert found["meaning"]
    assert {key: found[key] for key in ("category", "evidence", "line_number", "process", "phase", "link")} == {
        "category": "engine_death",
        "evidence": "AssertionError: tokens",
        "line_number": 7,
        "process": "Worker_TP1",
        "phase": "serving",
        "link": "docs/crashes.md#engine_death",
    }


def test_a_log_without_an_error() -> None:
    done = run("-", text=serving())
    assert done.returncode == 1
    assert "this log has no error" in done.stdout


def test_a_file_that_is_not_there() -> None:
    done = run("/nonexistent/vllm.log")
    assert done.returncode == 2
    assert done.stderr.startswith("sloguard: LOG: /nonexistent/vllm.log: No such file or directory")
