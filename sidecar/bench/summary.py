"""Summarises the runs of one optimizer on one landscape. Pure.

A run that found nothing feasible has no best value: medians and spreads leave it out (``found`` is the number of runs
they cover), and the test ranks it worst.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.bench.published_study import consistency
from sidecar.bench.simulate import SimulatedRun
from sidecar.search.contract import ObservedStatus


@dataclass(frozen=True)
class SummaryRow:
    """One row of the table. ``None`` if no run has a value; times in the units of their names.

    ``first_feasible_median`` counts trials from 1. ``best`` is a run's lowest measured latency, ``regret`` the relative
    distance of its median to the best known. ``served`` is the candidate's mean latency over the re-measurements that
    met the SLO, ``served_feasible`` the share that did, ``regret_served`` the relative distance of the median
    ``served`` to the best known; a run without a candidate, or whose candidate never met the SLO again, counts as
    infinite in it (None if that is the median). ``measured_s_mean`` is the total load time of a run in seconds, without
    starts. ``p`` and ``a12`` compare the runs' best with those of ``against``: two-sided Mann-Whitney, and the
    probability that a run beats one of ``against``, ties counted half.
    """

    landscape: str
    optimizer: str
    seeds: int
    found: int
    first_feasible_median: float | None
    crashes_mean: float
    feasible_mean: float
    refused_mean: float
    best_median: float | None
    best_std: float | None
    regret: float | None
    served_median: float | None
    served_feasible: float | None
    regret_served: float | None
    cost_s_mean: float
    measured_s_mean: float
    fast_mean: float | None
    consistency_mean: float | None
    against: str | None
    p: float | None
    a12: float | None


def best_known(runs: Sequence[SimulatedRun], stated_ms: float | None) -> float | None:
    """The landscape's own best known, else the best of everything that ran."""
    if stated_ms is not None:
        return stated_ms
    return min((run.best.latency_ms for run in runs if run.best is not None), default=None)


def row(
    runs: Sequence[SimulatedRun], known_ms: float | None, fast_ms: float | None, reference: Sequence[SimulatedRun]
) -> SummaryRow:
    """Summarises the runs of one optimizer; ``reference`` are the runs to compare with, if any."""
    best = [run.best.latency_ms for run in runs if run.best is not None]
    median = _median(best)
    fast = [] if fast_ms is None else [[t.estimated_ms < fast_ms for t in run.trials] for run in runs]
    steady = [share for hits in fast if (share := consistency(hits)) is not None]
    compared = mann_whitney(bests(runs), bests(reference)) if reference else (None, None)
    remeasured = [run.served_feasible for run in runs if run.served_feasible is not None]
    return SummaryRow(
        landscape=runs[0].landscape,
        optimizer=runs[0].optimizer,
        seeds=len(runs),
        found=len(best),
        first_feasible_median=_median([n for run in runs if (n := first_feasible(run)) is not None]),
        crashes_mean=_mean([_count(run, ObservedStatus.CRASHED) for run in runs]),
        feasible_mean=_mean([_count(run, ObservedStatus.FEASIBLE) for run in runs]),
        refused_mean=_mean([run.refused for run in runs]),
        best_median=median,
        best_std=None if not best else statistics.stdev(best) if len(best) > 1 else 0.0,
        regret=None if median is None or not known_ms else median / known_ms - 1,
        served_median=_median([run.served_ms for run in runs if run.served_ms is not None]),
        served_feasible=_mean(remeasured) if remeasured else None,
        regret_served=_regret_served(runs, known_ms),
        measured_s_mean=_mean([sum(t.measured_s for t in run.trials) for run in runs]),
        cost_s_mean=_mean([sum(t.verdict.cost_s for t in run.trials) for run in runs]),
        fast_mean=_mean([sum(hits) for hits in fast]) if fast else None,
        consistency_mean=_mean(steady) if steady else None,
        against=reference[0].optimizer if reference else None,
        p=compared[0],
        a12=compared[1],
    )


def _regret_served(runs: Sequence[SimulatedRun], known_ms: float | None) -> float | None:
    median = statistics.median(math.inf if run.served_ms is None else run.served_ms for run in runs)
    return None if not known_ms or math.isinf(median) else median / known_ms - 1


def first_feasible(run: SimulatedRun) -> int | None:
    """The number of the first feasible trial, from 1."""
    return next((n for n, t in enumerate(run.trials, 1) if t.verdict.outcome is ObservedStatus.FEASIBLE), None)


def bests(runs: Sequence[SimulatedRun]) -> list[float]:
    """The best latency of each run; infinite if it found none."""
    return [math.inf if run.best is None else run.best.latency_ms for run in runs]


def mann_whitney(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Two-sided Mann-Whitney p, and the probability that one of ``ours`` is lower, ties counted half (A12)."""
    # Imported here: this import is slower than all others of a command.
    from scipy.stats import mannwhitneyu  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    a12 = statistics.fmean((mine < other) + 0.5 * (mine == other) for mine in ours for other in theirs)
    p = float(mannwhitneyu(ours, theirs, alternative="two-sided").pvalue)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    return (1.0 if math.isnan(p) else p), a12


def _count(run: SimulatedRun, outcome: ObservedStatus) -> int:
    return sum(trial.verdict.outcome is outcome for trial in run.trials)


def _mean(values: Sequence[float]) -> float:
    return float(statistics.fmean(values))


def _median(values: Sequence[float]) -> float | None:
    return float(statistics.median(values)) if values else None
