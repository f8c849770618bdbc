"""A landscape with a cliff, on which every search must beat random draws."""

import math
from statistics import mean, median

import numpy as np
import pytest
from search_cases import crashed, feasible, infeasible, refused

from sidecar.search.contract import Observation, ObservedStatus
from sidecar.search.knob_values import to_unit
from sidecar.search.registry import make
from sidecar.search.space import Space
from vllm_sloguard.knobs import Knob, KnobKind, KnobValues

SEEDS = range(20)
BUDGET = 30
SPACE = Space(
    (
        Knob("max_num_seqs", KnobKind.INT, 4, 1024, log=True),
        Knob("max_num_batched_tokens", KnobKind.INT, 512, 16384, log=True),
        Knob("gpu_memory_utilization", KnobKind.FLOAT, 0.60, 0.95),
        Knob("enforce_eager", KnobKind.CATEGORICAL, choices=(False, True)),
        Knob("enable_chunked_prefill", KnobKind.CATEGORICAL, choices=(True, False), requires={"enforce_eager": False}),
        Knob("block_size", KnobKind.CATEGORICAL, choices=(16, 32, 64, 128)),
    )
)


def served(config: KnobValues) -> Observation:
    """Too little memory is refused, too many tokens at once crash, and the best lies near that edge."""
    seqs, tokens, memory = (
        float(to_unit(SPACE.by_name[name], np.array(config[name], dtype=float)))
        for name in ("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization")
    )
    if memory < 0.1:
        return refused(config)
    if seqs + tokens > 0.8 + 0.6 * memory:
        return crashed(config)
    latency = 0.4 + 0.6 * tokens + (0.5 if config["enforce_eager"] else 0.0) + abs(seqs - 0.6)
    if latency > 1.0:
        return infeasible(config, latency - 1.0)
    bonus = 0.2 * bool(config.get("enable_chunked_prefill")) + 0.1 * (config["block_size"] == 32)
    return feasible(config, 2.0 - (seqs - 0.6) ** 2 - (tokens - 0.3) ** 2 - (memory - 0.8) ** 2 + bonus)


def search(name: str, seed: int) -> list[Observation]:
    """The trials that ran, starting with an incumbent that runs but misses the SLO."""
    history = [served({**SPACE.project({}), "enforce_eager": True, "max_num_seqs": 64})]
    optimizer = make(name, SPACE, seed, BUDGET)
    while sum(o.outcome is not ObservedStatus.REFUSED for o in history) < BUDGET:
        history.append(served(optimizer.ask(history).config))
    return [o for o in history if o.outcome is not ObservedStatus.REFUSED]


def best(trials: list[Observation]) -> float:
    return max(
        (o.value for o in trials if o.outcome is ObservedStatus.FEASIBLE and o.value is not None), default=-math.inf
    )


def share(trials: list[Observation], outcome: ObservedStatus) -> float:
    return mean(o.outcome is outcome for o in trials)


@pytest.fixture(scope="module")
def random_runs() -> list[list[Observation]]:
    return [search("random", seed) for seed in SEEDS]


@pytest.mark.parametrize("name", ["tba-tpe", "tba", "tpe"])
def test_it_serves_more_crashes_less_and_ends_higher_than_random(
    name: str, random_runs: list[list[Observation]]
) -> None:
    runs = [search(name, seed) for seed in SEEDS]
    assert median(map(best, runs)) > median(map(best, random_runs))
    for outcome, sign in ((ObservedStatus.FEASIBLE, 1), (ObservedStatus.CRASHED, -1)):
        ours, theirs = (mean(share(trials, outcome) for trials in side) for side in (runs, random_runs))
        assert sign * (ours - theirs) > 0.05, (outcome, ours, theirs)
