"""Prints the lowest latency of each landscape of a file: random draws, then steps from the best of them.

Of a configuration counts the median latency of twelve trials, of which ten must be feasible. It takes about a minute a
landscape: python benchmarks/landscapes/best_known.py benchmarks/landscapes/crash_rich.py
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import numpy as np

from sidecar.bench.landscape import Landscape, load
from sidecar.search.contract import Outcome
from vllm_sloguard.knobs import Config

DRAWS, KEPT, STEPS, TRIALS, MOST_BAD = 3000, 12, 1000, 12, 2


def latency_ms(landscape: Landscape, config: Config) -> float | None:
    """The median of the feasible trials; None where too few are."""
    seen: list[float] = []
    for trial in range(TRIALS):
        verdict = landscape.evaluate(config, np.random.default_rng([2, trial]))
        if verdict.outcome is Outcome.FEASIBLE and verdict.latency_ms is not None:
            seen.append(verdict.latency_ms)
        elif trial + 1 - len(seen) > MOST_BAD:
            return None
    return statistics.median(seen)


def best(landscape: Landscape) -> tuple[float, Config]:
    """The best configuration found, and its latency."""
    rng = np.random.default_rng(0)
    drawn = [landscape.incumbent, *(landscape.space.sample(rng) for _ in range(DRAWS))]
    found = [(value, n) for n, config in enumerate(drawn) if (value := latency_ms(landscape, config)) is not None]
    top = [(value, drawn[n]) for value, n in sorted(found)[:KEPT]]
    for step in range(STEPS):
        number = int(rng.integers(len(top)))
        value, config = top[number]
        moved = landscape.space.neighbour(config, rng, 0.3, float(rng.choice([0.02, 0.1, 0.3])))[0]
        again = latency_ms(landscape, moved)
        if again is not None and again < value:
            top[number] = again, moved
        if step % 100 == 99:  # what lies behind makes room for the best
            top.sort(key=lambda pair: pair[0])
            top = top[: max(3, len(top) - 1)]
    return min(top, key=lambda pair: pair[0])


if __name__ == "__main__":
    for name, landscape in load(Path(sys.argv[1]), *sys.argv[2:3]).items():
        value, config = best(landscape)
        print(f"{name}: {value:.4g} ms, stated {landscape.best_known_ms:.4g}: {dict(config)}", flush=True)
