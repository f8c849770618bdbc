"""Prints the lowest latency of each landscape of a file, among the configurations that serve what they must.

These are configurations that the guard leaves as they are, of a length that the host's longest request fits: shorter
ones reject requests, and fewer requests are faster. A configuration counts by the median latency of its feasible
trials, of which at least five in six must be feasible. The search draws at random, takes what runs of the default end
with, and steps from the best, where many trials say so. The last ones are compared by trials that no step has seen, and
what is printed is measured by others again, or the luckiest would be stated instead of the best. It takes some minutes
a landscape:
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
RUNS, FIRST_SEED, BUDGET = 20, 1000, 15  # of the default optimizer: what it finds may not be missed


@dataclass(frozen=True)
class Repeats:
    """Trials of one configuration, with noise of their own, of which ``bad`` may be infeasible."""

    stream: int
    trials: int
    bad: int


# Of every configuration, of what looks better, of the last ones, and of the best. More of few trials are bad by luck,
# so what shall hold for one in six is asked more strictly of the steps.
FEW, MANY, LAST, STATED = Repeats(0, 12, 2), Repeats(1, 48, 6), Repeats(2, 240, 40), Repeats(3, 480, 80)


def admitted(guard: SimulatedGuard, config: KnobValues, longest: int | None) -> KnobValues | None:
    """The arguments that ``config`` comes to, long enough for requests of ``longest`` tokens; None where refused."""
    length = config.get("max_model_len")
    if longest is not None and isinstance(length, int):
        config = {**config, "max_model_len": max(length, longest)}
    args, refusal, _ = guard.plan(config)
    return None if refusal else args


def latency_ms(landscape: Landscape, config: KnobValues, repeats: Repeats, below: float = math.inf) -> float | None:
    """The median of the feasible trials; None where it is not less than ``below``, or too many are infeasible."""
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
    """Those that are feasible, the best first."""
    found = [(value, n) for n, config in enumerate(configs) if (value := latency_ms(landscape, config, repeats))]
    return [(value, configs[n]) for value, n in sorted(found)]


def rounded(landscape: Landscape, rng: np.random.Generator) -> KnobValues:
    """The incumbent with half of its knobs redrawn, integers as powers of two: captured graphs end at one of them,
    and a uniform draw rarely hits it."""
    config = dict(landscape.incumbent)
    for name, value in landscape.space.sample(rng).items():
        if rng.random() < 0.5:
            written = isinstance(value, int) and not isinstance(value, bool) and value > 0
            config[name] = 2 ** round(math.log2(int(value))) if written else value
    return landscape.space.project(config)


def chosen(landscape: Landscape) -> list[KnobValues]:
    """What runs of the default optimizer end with, on seeds that no table has."""
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
        if step % 200 == 199:  # what lies behind makes room for the best
            top = sorted(top, key=lambda pair: pair[0])[:-1]
    for _, config in ranked(landscape, [config for _, config in top], LAST):
        if (value := latency_ms(landscape, config, STATED)) is not None:
            return value, config
    raise ValueError(f"{landscape.name}: nothing is feasible often enough")


if __name__ == "__main__":
    for name, landscape in load_landscapes(Path(sys.argv[1]), sys.argv[2] if sys.argv[2:] else None).items():
        value, config = best(landscape)
        print(f"{name}: {value:.4g} ms, stated {landscape.best_known_ms:.4g}: {dict(config)}", flush=True)
