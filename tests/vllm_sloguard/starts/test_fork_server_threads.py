"""A forked engine process has as many OpenMP threads as its environment would give a spawned one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")

_TOLD = """
import json, os, torch
from vllm_sloguard.starts import fork_server
from vllm_sloguard.starts.fork_server import _Forking

fork_server._CLAIMED_CORES = f"test/{os.getpid()}"  # apart from the host's engines

def tell(channel):
    channel.send((torch.get_num_threads(), sorted(os.sched_getaffinity(0))))

context = _Forking()
ours, theirs = context.Pipe()
os.environ.update(json.loads(os.environ["FOR_THE_FORK"]))
process = context.Process(target=tell, args=(theirs,))
process.start()
told = ours.recv()
process.join()
print(json.dumps([*told, process.exitcode]))
"""


@pytest.mark.parametrize("variable", ["GOMP_CPU_AFFINITY", "OMP_PLACES"])
def test_a_forked_process_binds_its_threads_as_a_new_one_would(variable: str):
    core = min(os.sched_getaffinity(0))
    places = {"GOMP_CPU_AFFINITY": str(core), "OMP_PLACES": f"{{{core}}}"}[variable]
    assert _told({"OMP_NUM_THREADS": "1", variable: places}) == [1, [core], 0]


_TWO = """
import json, os
from vllm_sloguard.starts import fork_server
from vllm_sloguard.starts.fork_server import _Forking

fork_server._CLAIMED_CORES = f"test/{os.getpid()}"

def tell(channel):
    channel.send(sorted(os.sched_getaffinity(0)))
    channel.recv()

def start():
    ours, theirs = context.Pipe()
    process = context.Process(target=tell, args=(theirs,))
    process.start()
    return ours, process

def end(channel, process):
    channel.send("end")
    process.join()

context = _Forking()
import torch
os.environ.update(json.loads(os.environ["FOR_THE_FORK"]))
first, second = start(), start()
told = [first[0].recv(), second[0].recv()]
end(*first)
third = start()
told.append(third[0].recv())
for engine in (second, third):
    end(*engine)
print(json.dumps(told))
"""


def test_two_forked_engines_are_not_bound_to_the_same_cores():
    """vLLM gives both the same list; the second may use any core until the first has ended."""
    cores = sorted(os.sched_getaffinity(0))
    environment = {"OMP_NUM_THREADS": "1", "OMP_PLACES": f"{{{cores[0]}}}"}

    assert json.loads(_run(_TWO, FOR_THE_FORK=json.dumps(environment))) == [cores[:1], cores, cores[:1]]


def test_threads_are_not_bound_unless_vllm_asks_for_it():
    threads, cores, code = _told({})
    assert cores == sorted(os.sched_getaffinity(0))
    assert threads == int(_run("import torch; print(torch.get_num_threads())"))
    assert code == 0


def _told(environment: dict[str, str]) -> list[object]:
    return json.loads(_run(_TOLD, FOR_THE_FORK=json.dumps(environment)))


def _run(code: str, **more: str) -> str:
    ours = {n: v for n, v in os.environ.items() if not n.startswith(("OMP_", "GOMP_"))}
    root = str(Path(__file__).parents[3])
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**ours, **more, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return told.stdout
