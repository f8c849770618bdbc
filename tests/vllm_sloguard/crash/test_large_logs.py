"""A log of any size: linear time, memory that does not grow with it."""

import subprocess
import sys
import time
from collections.abc import Iterator

from vllm_logs import serving, traceback, v1

from vllm_sloguard.crash import Category, classify, classify_stream

MIB = 2**20
ACCESS = '(APIServer pid=1) INFO:     127.0.0.1:50052 - "POST /v1/completions HTTP/1.1" 200 OK\n'

# Reads a log of the given size from a generator and prints the growth of its own resident memory, in MiB.
MEASURE = """
import resource, sys
from vllm_sloguard.crash import classify_stream

line = sys.argv[2].encode().decode("unicode_escape")
chunk = line * (65536 // len(line) + 1)

def log(mib):
    for _ in range(mib * 2**20 // len(chunk)):
        yield chunk
    yield "\\n(EngineCore pid=1) ERROR 11-22 05:29:01 [core.py:1] KeyError: 'kv'\\n"

classify_stream(log(1), exit_code=None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
crash = classify_stream(log(int(sys.argv[1])), exit_code=None)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024, crash.evidence)
"""


def growth_mib(size_mib: int, line: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(size_mib), line], capture_output=True, text=True, check=True, timeout=300
    )
    growth, evidence = done.stdout.strip().split(" ", 1)
    assert evidence == "KeyError: 'kv'"
    return float(growth)


def test_memory_does_not_grow_with_the_log() -> None:
    assert growth_mib(16, ACCESS.replace("\n", "\\n")) < 4


def test_memory_does_not_grow_with_a_line() -> None:
    assert growth_mib(12, "x" * 1000) < 4


def test_memory_does_not_grow_with_errors() -> None:
    error = (
        "(Worker_TP1 pid=9) ERROR 11-22 05:29:01 [a.py:1] Request 7 has failed\\nTraceback (most recent call last):\\n"
    )
    assert growth_mib(4, error) < 4


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
