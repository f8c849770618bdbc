"""Runs many simulations on a few single-threaded processes."""

import math
import multiprocessing
import os
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
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
    seeds: tuple[int, ...]
    options: SimulationOptions

    def batches(self, finished: Collection[int] = ()) -> list["Task"]:
        """The seeds that are not finished, a few per task."""
        left = [seed for seed in self.seeds if seed not in finished]
        pieces = (left[low : low + _SEEDS_A_TASK] for low in range(0, len(left), _SEEDS_A_TASK))
        return [replace(self, seeds=tuple(piece)) for piece in pieces]


def run_all(
    todo: Sequence[Task], jobs: int, time_limit_s: float = math.inf
) -> Iterator[tuple[Task, list[SimulatedRun]]]:
    """The runs of each task, in order of completion. No task starts after ``time_limit_s``."""
    # Must be set before any library reads them, here and in child processes.
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    deadline = time.monotonic() + time_limit_s
    if jobs <= 1:
        for task in todo:
            if time.monotonic() >= deadline:
                return
            yield task, run(task)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending: dict[Future[list[SimulatedRun]], Task] = {pool.submit(run, task): task for task in todo}
        try:
            while pending:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    pending = {future: task for future, task in pending.items() if not future.cancel()}
                timeout_s = left_s if 0 < left_s < math.inf else None
                done, _ = wait(pending, timeout=timeout_s, return_when=FIRST_COMPLETED)
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
