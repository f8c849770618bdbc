"""A log of any size: linear time, memory that does not grow with it."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from vllm_logs import serving, traceback, v1

from vllm_sloguard.crash import Category, classify, classify_stream

ACCESS = '(APIServer pid=1) INFO:     127.0.0.1:50052 - "POST /v1/completions HTTP/1.1" 200 OK\n'

# Reads a quarter of a log from a generator, and then all of it. Prints by how many MiB its resident memory has grown
# meanwhile, and how many times longer the whole log took.
MEASURE = """
import resource, sys, time
from vllm_sloguard.crash import classify_stream

line = sys.argv[2].encode().decode("unicode_escape")
chunk = line * (65536 // len(line) + 1)

def log(mib):
    for _ in range(int(mib * 2**20) // len(chunk)):
        yield chunk
    yield "\\n(EngineCore pid=1) ERROR 11-22 05:29:01 [core.py:1] KeyError: 'kv'\\n"

def seconds(mib):
    begin = time.process_time()
    crash = classify_stream(log(mib), exit_code=None)
    assert crash.evidence == "KeyError: 'kv'"
    return time.process_time() - begin

size = float(sys.argv[1])
seconds(0.1)
quarter, before = seconds(size / 4), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
whole, after = seconds(size), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024, whole / quarter)
"""
LINES = {
    "requests": (8, ACCESS),
    "a line without an end": (32, "x" * 1000),
    "plain lines": (6, "Loading weights: layer 3 of the model, almost done by now\n"),
    "errors": (
        3,
        "(Worker_TP1 pid=9) ERROR 11-22 05:29:01 [a.py:1] Request 7 has failed\nTraceback (most recent call last):\n",
    ),
}


@pytest.mark.parametrize("kind", LINES)
def test_memory_does_not_grow_with_the_log_and_time_is_linear(kind: str) -> None:
    size_mib, line = LINES[kind]
    words = [sys.executable, "-c", MEASURE, str(size_mib), line.replace("\n", "\\n")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    growth_mib, ratio = map(float, done.stdout.split())
    assert growth_mib < 1
    assert ratio < 8


def test_a_cause_far_from_the_end_is_found() -> None:
    def log() -> Iterator[str]:
        yield serving() + "\n" + v1("Worker_TP0", traceback("AssertionError: early")) + "\n"
        for _ in range(40):
            yield ACCESS * 1000

    crash = classify_stream(log(), exit_code=None)
    assert (crash.category, crash.evidence) == (Category.ENGINE_DEATH, "AssertionError: early")


def test_time_is_linear_in_hostile_lines() -> None:
    hostile = [
        "(a pid=1) " * 100_000,
        "A.b" * 300_000,
        "INFO: x\n" * 30_000,
        "ERROR 11-22 05:29:01 " * 30_000,
        "RuntimeError: " + "out of memory " * 50_000,
        '{"log":' * 50_000,
        'Traceback (most recent call last): File "x" ' * 20_000,
        "a " * 200_000 + "|",
        "[" * 200_000,
    ]
    for text in hostile:
        begin = time.process_time()
        classify(text, phase="serving", exit_code=0)
        assert time.process_time() - begin < 10, text[:40]
