"""The landscapes under benchmarks/: their stated properties, and that the study's behaves as published."""

import statistics
from pathlib import Path

import numpy as np
import pytest

from sidecar.bench.landscape import Landscape, load_landscapes
from sidecar.bench.simulate import SimulatedGuard, SimulationOptions, simulate, whole_load
from sidecar.bench.summary import SummaryRow, row
from sidecar.search.contract import ObservedStatus
from vllm_sloguard.knobs import KnobValues

FOLDER = Path(__file__).parents[3] / "benchmarks" / "landscapes"
CRASH_RICH = load_landscapes(FOLDER / "crash_rich.py")
PAPER = load_landscapes(FOLDER / "paper.py")["paper"]
ALL = {**CRASH_RICH, "paper": PAPER}


def outcomes(landscape: Landscape, config: KnobValues, trials: int) -> list[ObservedStatus]:
    return [whole_load(landscape, config, np.random.default_rng([5, n])).outcome for n in range(trials)]


@pytest.mark.parametrize("name", ALL)
def test_each_says_what_it_is_scaled_from(name: str) -> None:
    assert any(word in ALL[name].about for word in ("scaled from", "Scaled from", "as measured", "The study's"))


@pytest.mark.parametrize("name", ALL)
def test_the_incumbent_works_and_the_guard_leaves_it_alone(name: str) -> None:
    landscape = ALL[name]

    args, refusal, kv_tokens = SimulatedGuard(landscape).plan(landscape.incumbent)

    assert (args, refusal) == (dict(landscape.incumbent), "")
    assert kv_tokens
    assert outcomes(landscape, args, 20).count(ObservedStatus.FEASIBLE) >= 17


@pytest.mark.parametrize("name", ALL)
def test_a_trial_is_the_same_for_the_same_generator(name: str) -> None:
    landscape = ALL[name]

    verdicts = [whole_load(landscape, landscape.incumbent, np.random.default_rng(n)) for n in (1, 1, 2)]

    assert verdicts[0] == verdicts[1]
    assert verdicts[0] != verdicts[2]


@pytest.mark.parametrize("name", CRASH_RICH)
def test_most_of_the_space_crashes_or_misses_the_slo(name: str) -> None:
    landscape, rng = CRASH_RICH[name], np.random.default_rng(0)
    verdicts = [whole_load(landscape, landscape.space.sample(rng), rng) for _ in range(100)]

    found = [verdict.outcome for verdict in verdicts]
    assert found.count(ObservedStatus.FEASIBLE) < 0.5 * len(found)
    assert found.count(ObservedStatus.CRASHED) > 0.2 * len(found)
    assert all(10 < verdict.cost_s < 900 for verdict in verdicts)


@pytest.mark.parametrize("name", ALL)
def test_nothing_that_is_drawn_is_far_better_than_the_best_known(name: str) -> None:
    landscape, rng = ALL[name], np.random.default_rng(1)
    assert landscape.best_known_ms is not None

    for _ in range(60):
        config = landscape.space.sample(rng)
        again = [whole_load(landscape, config, np.random.default_rng([6, n])) for n in range(5)]
        latencies = [v.latency_ms for v in again if v.outcome is ObservedStatus.FEASIBLE and v.latency_ms is not None]
        if len(latencies) == 5:
            assert statistics.median(latencies) > 0.95 * landscape.best_known_ms


def test_a_neighbour_that_grows_is_seen_by_no_guard() -> None:
    landscape = CRASH_RICH["growing-tenant"]
    config = {**landscape.incumbent, "gpu_memory_utilization": 0.7}

    assert SimulatedGuard(landscape).plan(config)[0] == config
    assert outcomes(landscape, config, 20).count(ObservedStatus.CRASHED) >= 15


def on_the_papers(optimizer: str) -> SummaryRow:
    runs = [
        simulate(PAPER, optimizer, seed, SimulationOptions(15, guarded=False, whole_loads=True, remeasurements=0))
        for seed in range(100)
    ]
    return row(runs, None, PAPER.fast_ms, [])


def test_random_behaves_on_the_studys_space_as_published() -> None:
    made = on_the_papers("random")

    assert (made.feasible_mean, made.crashes_mean) == (15, 0)
    assert made.fast_mean is not None
    assert made.consistency_mean is not None
    assert 7.1 <= made.fast_mean <= 8.1
    assert 0.45 <= made.consistency_mean <= 0.57


def test_tba_tpe_behaves_on_the_studys_space_as_published() -> None:
    made = on_the_papers("tba-tpe")

    assert (made.feasible_mean, made.crashes_mean) == (15, 0)
    assert made.fast_mean is not None
    assert made.consistency_mean is not None
    assert 10 <= made.fast_mean <= 11.7
    assert 0.68 <= made.consistency_mean <= 0.90
