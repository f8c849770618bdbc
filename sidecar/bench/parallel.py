"""Runs many simulations on a few single-threaded processes."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sidecar.bench.landscape import Landscape, LandscapeError, load_landscapes
from sidecar.bench.simulate import SimulatedRun, SimulationOptions, simulate

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_SEEDS_A_TASK = 5


@dataclass(frozen=True)
class Task:
    """A few seeds of one optimizer on one landscape."""

    file: Path
    landscape: str
    optimizer: str
    seeds: range
    options: SimulationOptions


def tasks(file: Path, landscape: str, optimizer: str, seeds: int, options: SimulationOptions) -> list[Task]:
    """The seeds from 0 on, in batches."""
    pieces = (range(low, min(low + _SEEDS_A_TASK, seeds)) for low in range(0, seeds, _SEEDS_A_TASK))
    return [Task(file, landscape, optimizer, piece, options) for piece in pieces]


def run_all(todo: Sequence[Task], jobs: int) -> Iterator[tuple[Task, list[SimulatedRun]]]:
    """The runs of each task, in order of completion."""
    # Must be set before any library reads them, here and in child processes.
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    if jobs <= 1:
        yield from ((task, run(task)) for task in todo)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending: dict[Future[list[SimulatedRun]], Task] = {pool.submit(run, task): task for task in todo}
        try:
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield pending.pop(future), future.result()
        except BrokenProcessPool:
            raise LandscapeError("a process that ran a landscape has ended: does evaluate() end it?") from None
        finally:
            pool.shutdown(cancel_futures=True)


def run(task: Task) -> list[SimulatedRun]:
    """Runs one task in this process."""
    landscape = _loaded(task.file, task.landscape)
    return [simulate(landscape, task.optimizer, seed, task.options) for seed in task.seeds]


@cache
def _loaded(file: Path, name: str) -> Landscape:
    return load_landscapes(file, name)[name]
