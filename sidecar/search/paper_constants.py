"""The constants of the search, as published in the SLO-Guard study (arXiv 2604.17627)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Parameters of Thermal Budget Annealing (TBA), of its handoff to TPE, and of TPE."""

    # Annealing
    initial_trials: int = 3
    temperature_start: float = 1.0
    temperature_floor: float = 0.001
    cooling: float = 0.92
    cooling_infeasible: float = 0.95
    patience_trials: int = 4
    reheat: float = 2.5
    reheat_cap: float = 0.8  # share of the start
    first_feasible: float = 0.7  # share of the start
    # Violations are relative to their limit here, so the mean cap of the study is 1.
    violation_scale: float = 0.1
    crash_violation: float = 100.0
    # Neighbours
    step: float = 0.3
    structural_start: float = 0.5
    structural_end: float = 0.25
    blacklist_failures: int = 3
    blacklist_trials: int = 8
    # Handoff; a divisor of 5 stands for budget // 5
    forced_percent: int = 40
    forced_trials: int = 5
    early_trials: int = 3
    early_divisor: int = 5
    feasible_trials: int = 2
    feasible_divisor: int = 6
    bad_trials: int = 1
    bad_divisor: int = 10


PUBLISHED = Published()
