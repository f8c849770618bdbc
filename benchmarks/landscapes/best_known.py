"""Prints the lowest latency of each landscape of a file, among the valid configurations.

Valid are configurations that the guard leaves unchanged, with a max_model_len that the host's longest request fits:
shorter ones reject requests, and fewer requests are faster. A configuration counts by the median latency of its
feasible trials, of which at least five in six must be feasible. The search draws at random, adds the results of runs of
the default optimizer, and takes steps from the best, confirmed by many trials. The finalists are compared on fresh
trials, and the printed latency is measured on yet others, so that it is not the luckiest one. It takes a few minutes
per landscape:
python benchmarks/landscapes/best_known.py benchmarks/landscapes/crash_rich.py [NAME]
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidecar.bench.landscape import Landscape, load_landscapes
from sidecar.bench.simulate import SimulatedGuard, SimulationOptions, simulate, whole_load_ms
from sidecar.search.registry import DEFAULT
from vllm_sloguard.knobs import KnobValues

DRAWS, ROUND, KEPT, STEPS = 2000, 1000, 12, 800
RUNS, FIRST_SEED, BUDGET = 20, 1000, 15  # of the default optimizer, whose results are included


@dataclass(frozen=True)
class Repeats:
    """Trials of one configuration with their own noise, of which ``bad`` may be infeasible."""

    stream: int
    trials: int
    bad: int


# For every configuration, for promising ones, for the finalists, and for the best. With few trials a valid
# configuration is unlucky more often, so early steps apply the one-in-six rule more strictly.
FEW, MANY, LAST, STATED = Repeats(0, 12, 2), Repeats(1, 48, 6), Repeats(2, 240, 40), Repeats(3, 480, 80)


def admitted(guard: SimulatedGuard, config: KnobValues, longest: int | None) -> KnobValues | None:
    """``config`` applied to the arguments, long enough for requests of ``longest`` tokens; None if refused."""
    length = config.get("max_model_len")
    if longest is not None and isinstance(length, int):
        config = {**config, "max_model_len": max(length, longest)}
    args, refusal, _ = guard.plan(config)
    return None if refusal else args


def latency_ms(landscape: Landscape, config: KnobValues, repeats: Repeats, below: float = math.inf) -> float | None:
    """The median of the feasible trials; None if it is not below ``below``, or too many are infeasible."""
    seen: list[float] = []
    slower = 0
    for trial in range(repeats.trials):
        measured_ms = whole_load_ms(landscape, config, np.random.default_rng([2, repeats.stream, trial]))
        if measured_ms is not None:
            seen.append(measured_ms)
            slower += measured_ms >= below
        if trial + 1 - len(seen) > repeats.bad or 2 * slower > repeats.trials:
            return None
    median = statistics.median(seen)
    return median if median < below else None


def ranked(landscape: Landscape, configs: list[KnobValues], repeats: Repeats) -> list[tuple[float, KnobValues]]:
    """The feasible ones, best first."""
    found = [(value, n) for n, config in enumerate(configs) if (value := latency_ms(landscape, config, repeats))]
    return [(value, configs[n]) for value, n in sorted(found)]


def rounded(landscape: Landscape, rng: np.random.Generator) -> KnobValues:
    """The incumbent with half of its knobs redrawn, integers as powers of two: CUDA graph sizes end at one of them,
    which a uniform draw rarely hits."""
    config = dict(landscape.incumbent)
    for name, value in landscape.space.sample(rng).items():
        if rng.random() < 0.5:
            written = isinstance(value, int) and not isinstance(value, bool) and value > 0
            config[name] = 2 ** round(math.log2(int(value))) if written else value
    return landscape.space.project(config)


def chosen(landscape: Landscape) -> list[KnobValues]:
    """Results of the default optimizer, on seeds that no table uses."""
    runs = (simulate(landscape, DEFAULT, FIRST_SEED + number, SimulationOptions(BUDGET)) for number in range(RUNS))
    return [run.best.config for run in runs if run.best is not None]


def best(landscape: Landscape) -> tuple[float, KnobValues]:
    """The best configuration found, and its latency."""
    rng, guard, longest = np.random.default_rng(0), SimulatedGuard(landscape), landscape.host.max_len_needed
    drawn: list[KnobValues] = [landscape.space.sample(rng) for _ in range(DRAWS)]
    drawn += [landscape.incumbent, *(rounded(landscape, rng) for _ in range(ROUND)), *chosen(landscape)]
    starts = [args for config in drawn if (args := admitted(guard, config, longest)) is not None]
    likely = [config for _, config in ranked(landscape, starts, FEW)[: 4 * KEPT]]
    top = ranked(landscape, likely, MANY)[:KEPT]
    for step in range(STEPS):
        number = int(rng.integers(len(top)))
        value, config = top[number]
        moved = config
        for _ in range(int(rng.integers(1, 4))):
            moved = landscape.space.neighbour(moved, rng, 0.3, float(rng.choice([0.02, 0.1, 0.3])))[0]
        args = admitted(guard, moved, longest)
        if args is not None and latency_ms(landscape, args, FEW, value) is not None:
            surely = latency_ms(landscape, args, MANY, value)
            top[number] = (value, config) if surely is None else (surely, args)
        if step % 200 == 199:  # drop the others in favour of the best
            top = sorted(top, key=lambda pair: pair[0])[:-1]
    for _, config in ranked(landscape, [config for _, config in top], LAST):
        if (value := latency_ms(landscape, config, STATED)) is not None:
            return value, config
    raise ValueError(f"{landscape.name}: nothing is feasible often enough")


if __name__ == "__main__":
    for name, landscape in load_landscapes(Path(sys.argv[1]), sys.argv[2] if sys.argv[2:] else None).items():
        value, config = best(landscape)
        print(f"{name}: {value:.4g} ms, stated {landscape.best_known_ms:.4g}: {dict(config)}", flush=True)
