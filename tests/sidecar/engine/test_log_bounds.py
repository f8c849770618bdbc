"""Engines' logs stay within bounds while they are written, and the cause of a crash is kept."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sidecar.engine import log_bounds
from sidecar.engine.log_bounds import bound_logs, bounded_logs
from vllm_sloguard.crash import Category, classify_file

# Writes 120 MiB, then the reason why it ends.
TALKATIVE = """
import os, sys, time
os.write(1, b"started with --max-num-seqs 8\\n")
line = b"INFO 11-22 05:14:16 [loggers.py:1] " + b"x" * 964 + b"\\n"
for number in range(120 * 1024):
    os.write(1, line)
    if number % 2048 == 0:
        time.sleep(0.05)
os.write(1, b"(EngineCore pid=1) ERROR 11-22 05:14:17 [core.py:9] torch.OutOfMemoryError: CUDA out of memory. "
    b"Tried to allocate 2.00 GiB.\\n")
"""


def never(_descriptor: int, _at: int, _count: int) -> bool:
    return False


def used(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.glob("*.log"))


@pytest.mark.parametrize("holes", [True, False])
def test_a_log_is_bounded_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holes: bool) -> None:
    monkeypatch.setattr(log_bounds, "_EVERY_S", 0.1)
    if not holes:  # as on a file system that has none
        monkeypatch.setattr(log_bounds, "_release", never)
    log, most = tmp_path / "engine-000000000001.log", 0
    with bounded_logs(tmp_path), log.open("ab") as output:
        with subprocess.Popen([sys.executable, "-c", TALKATIVE], stdout=output) as engine:
            while engine.poll() is None:
                most = max(most, used(tmp_path))
                time.sleep(0.02)
        bound_logs(tmp_path)
    # What is written between two looks comes on top, on a busy machine too.
    assert most < 3 * log_bounds.MAX_LOG_BYTES
    assert used(tmp_path) <= log_bounds.MAX_LOG_BYTES
    crash = classify_file(log, phase="serving", exit_code=1, tail_bytes=2**23)
    assert crash.category is Category.OUT_OF_MEMORY
    if holes:
        assert log.read_bytes().startswith(b"started with --max-num-seqs 8\n")


def test_the_oldest_logs_go_first_and_none_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_bounds, "MAX_TOTAL_BYTES", 4 * 2**20)
    logs = [tmp_path / f"engine-{number:012}.log" for number in range(6)]
    with logs[0].open("wb") as output, subprocess.Popen(["sleep", "60"], stdout=output) as oldest:
        for number, log in enumerate(logs):
            with log.open("ab") as file:
                file.write(b"x" * 2**20)
            time.sleep(0.02 * (number + 1))
        bound_logs(tmp_path)
        assert [log.name for log in logs if log.exists()] == [log.name for log in (logs[0], *logs[2:])]
        oldest.kill()


def test_no_more_than_a_hundred_logs_are_kept(tmp_path: Path) -> None:
    for number in range(130):
        (tmp_path / f"engine-{number:012}.log").write_text("x")
    bound_logs(tmp_path)
    assert len(list(tmp_path.iterdir())) == 100
