"""A simulated run takes the steps of a tuning run."""

from pathlib import Path

import pytest
from bench_cases import INSTANCE, slope

from sidecar.bench.simulate import SimulatedGuard, SimulationOptions, simulate
from sidecar.search.contract import ObservedStatus
from sidecar.search.registry import OPTIMIZERS

# Memory decides: the card has 20 GiB free of 80.
CROWDED = INSTANCE.replace('"gpu_free_gib": 79', '"gpu_free_gib": 20').replace(
    '{"max_num_seqs": {"type": "int", "low": 4.0, "high": 128.0, "log": True}}',
    '{"max_num_seqs": {"type": "int", "low": 4, "high": 128, "log": True},'
    ' "gpu_memory_utilization": {"type": "float", "low": 0.1, "high": 0.95}}',
)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_is_as_long_as_its_budget_and_the_same_for_a_seed(tmp_path: Path, optimizer: str) -> None:
    landscape = slope(tmp_path)

    run = simulate(landscape, optimizer, 3, SimulationOptions(6))

    assert len(run.trials) == 6
    assert run == simulate(landscape, optimizer, 3, SimulationOptions(6))
    assert run != simulate(landscape, optimizer, 4, SimulationOptions(6))


def test_the_best_is_the_lowest_feasible_latency_and_is_served_again(tmp_path: Path) -> None:
    run = simulate(slope(tmp_path), "random", 0, SimulationOptions(12))

    feasible = [t for t in run.trials if t.verdict.outcome is ObservedStatus.FEASIBLE]
    assert run.best is not None
    assert run.best.latency_ms == min(t.latency_ms for t in feasible)
    assert run.served_ms == pytest.approx(run.best.latency_ms, abs=1)
    assert run.served_ms != run.best.latency_ms
    assert run.served_feasible == 1
    assert {t.verdict.outcome for t in run.trials} == {
        ObservedStatus.FEASIBLE,
        ObservedStatus.INFEASIBLE,
        ObservedStatus.CRASHED,
    }


def test_noise_depends_on_seed_and_trial_alone(tmp_path: Path) -> None:
    landscape = slope(tmp_path, INSTANCE.replace("10.0 * seqs + rng", "rng").replace("seqs > 64", "False"))

    first, second = (
        [t.verdict.latency_ms for t in simulate(landscape, name, 1, SimulationOptions(5)).trials]
        for name in ("random", "tba")
    )

    assert first == second
    assert len(set(first)) == 5


def test_what_ran_is_what_the_guard_made_of_it(tmp_path: Path) -> None:
    landscape = slope(tmp_path, CROWDED)

    trials = simulate(landscape, "random", 0, SimulationOptions(10)).trials

    assert max(float(t.config["gpu_memory_utilization"]) for t in trials) < 20 / 80
    assert all(t.config["max_model_len"] == 2048 for t in trials)


def test_a_refusal_costs_no_budget_and_a_search_of_refusals_alone_ends(tmp_path: Path) -> None:
    run = simulate(
        slope(tmp_path, CROWDED.replace('"weights_gib": 15', '"weights_gib": 25')), "random", 0, SimulationOptions(10)
    )

    assert (run.trials, run.best, run.served_ms) == ((), None, None)
    assert run.refused == 20


def test_without_the_guard_nothing_is_changed(tmp_path: Path) -> None:
    run = simulate(slope(tmp_path, CROWDED), "random", 0, SimulationOptions(10, guarded=False))

    assert run.refused == 0
    assert max(float(t.config["gpu_memory_utilization"]) for t in run.trials) > 0.5


def test_the_guard_tells_an_optimizer_what_would_run(tmp_path: Path) -> None:
    guard = SimulatedGuard(slope(tmp_path, CROWDED))

    repaired = guard.project({"max_num_seqs": 16, "gpu_memory_utilization": 0.9})
    assert set(repaired.config) == {"max_num_seqs", "gpu_memory_utilization"}
    assert float(repaired.config["gpu_memory_utilization"]) < 0.25
    assert repaired.kv_tokens
    assert repaired.kv_tokens > 2048
    raised = guard.project({"max_num_seqs": 16, "gpu_memory_utilization": 0.1})
    assert float(raised.config["gpu_memory_utilization"]) > 0.19
    heavy = SimulatedGuard(slope(tmp_path, CROWDED.replace('"weights_gib": 15', '"weights_gib": 25')))
    assert "needs utilization" in heavy.project({"max_num_seqs": 16, "gpu_memory_utilization": 0.1}).refusal


def test_a_host_that_says_nothing_is_not_guarded_for_memory(tmp_path: Path) -> None:
    start, end = CROWDED.index('return {"gpu_total_gib"'), CROWDED.index("    def slo")
    landscape = slope(tmp_path, f"{CROWDED[:start]}return {{}}\n\n{CROWDED[end:]}")

    assert SimulatedGuard(landscape).project({"max_num_seqs": 16, "gpu_memory_utilization": 0.95}).refusal == ""
