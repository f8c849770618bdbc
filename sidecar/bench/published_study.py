"""Computes the statistics of the SLO-Guard study (arXiv 2604.17627) from result files in its published format.

A folder holds ``<optimizer>_seed<n>/results.jsonl``, one trial per line. Consistency is the share of fast trials after
a run's first fast one; the best latency is the lowest among a run's feasible trials.
"""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sidecar.config.schema import ConfigError

FAST_MS = 1000.0
BASELINE = "random"
_FOLDER = re.compile(r"(?P<optimizer>.+)_seed(?P<seed>\d+)")
_LONGEST_MS = 1e12
_STATUSES = ("feasible", "infeasible", "crashed")


class StudyError(ConfigError):
    """Invalid results; the text is one line that names the file and the problem."""


@dataclass(frozen=True)
class StudyTrial:
    """One line. ``latency_ms`` is the mean request latency, ``None`` if nothing was measured."""

    status: str
    latency_ms: float | None

    @property
    def fast(self) -> bool:
        """Below a second."""
        return self.latency_ms is not None and self.latency_ms < FAST_MS


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over the ``n`` runs that have a value."""

    mean: float
    sd: float
    n: int


@dataclass(frozen=True)
class Summary:
    """One optimizer's runs. ``None``: no run has a value."""

    optimizer: str
    runs: int
    trials: int
    feasible: int
    crashed: int
    fast: Spread | None
    consistency: Spread | None
    best_ms: Spread | None


@dataclass(frozen=True)
class StudyComparison:
    """Mann-Whitney p-values of an optimizer against the baseline: one-sided for "better", and two-sided.

    ``tighter`` is the baseline's spread over the optimizer's.
    """

    metric: str
    optimizer: str
    baseline: str
    p_better: float
    p_two_sided: float
    tighter: float | None


Runs = Mapping[str, Sequence[Sequence[StudyTrial]]]


def read_runs(folder: Path) -> dict[str, list[list[StudyTrial]]]:
    """The runs of each optimizer. Raises StudyError for missing or broken files, or fewer than two optimizers."""
    if not folder.is_dir():
        raise StudyError(f"{folder}: there is no such folder")
    runs: dict[str, list[list[StudyTrial]]] = {}
    for path in sorted(folder.glob("*/results.jsonl")):
        matched = _FOLDER.fullmatch(path.parent.name)
        if matched is None:
            raise StudyError(f"{path.parent}: must be called <optimizer>_seed<n>")
        runs.setdefault(matched["optimizer"], []).append(_trials(path))
    if not runs:
        raise StudyError(f"{folder}: holds no <optimizer>_seed<n>/results.jsonl")
    if len(runs) < 2:
        raise StudyError(f"{folder}: holds runs of {next(iter(runs))} alone; two optimizers are needed to compare")
    return runs


def _trials(path: Path) -> list[StudyTrial]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read: {error}") from None
    trials = [_trial(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not trials:
        raise StudyError(f"{path}: holds no trial")
    return trials


def _trial(where: str, line: str) -> StudyTrial:
    try:
        loaded: object = json.loads(line)
    except (ValueError, RecursionError):
        raise StudyError(f"{where}: not JSON") from None
    if not isinstance(loaded, dict):
        raise StudyError(f"{where}: an object was expected")
    row = cast("dict[str, Any]", loaded)
    status, latency_ms = row.get("status"), row.get("avg_latency_ms")
    if status not in _STATUSES:
        raise StudyError(f"{where}: status must be one of {', '.join(_STATUSES)}, got {status!r}")
    number = isinstance(latency_ms, int | float) and not isinstance(latency_ms, bool) and 0 < latency_ms < _LONGEST_MS
    if latency_ms is not None and not number:
        raise StudyError(f"{where}: avg_latency_ms must be a positive number or null, got {latency_ms!r}")
    if status == "feasible" and latency_ms is None:
        raise StudyError(f"{where}: a feasible trial must have avg_latency_ms")
    return StudyTrial(str(status), None if latency_ms is None else float(latency_ms))


def consistency(hits: Sequence[bool]) -> float | None:
    """The share of hits after the first one; None if there is none, or nothing after it."""
    after = list(hits)[hits.index(True) + 1 :] if True in hits else list[bool]()
    return statistics.fmean(after) if after else None


def best_ms(run: Sequence[StudyTrial]) -> float | None:
    """The lowest latency of the feasible trials."""
    return min((t.latency_ms for t in run if t.status == "feasible" and t.latency_ms is not None), default=None)


def metric_values(runs: Sequence[Sequence[StudyTrial]]) -> dict[str, list[float]]:
    """Each metric, for the runs that have it."""
    hits = [[trial.fast for trial in run] for run in runs]
    return {
        "fast": [float(sum(run)) for run in hits],
        "consistency": [share for run in hits if (share := consistency(run)) is not None],
        "best_ms": [best for run in runs if (best := best_ms(run)) is not None],
    }


def summary(optimizer: str, runs: Sequence[Sequence[StudyTrial]]) -> Summary:
    """One optimizer's line."""
    trials = [trial for run in runs for trial in run]
    spreads = {metric: _spread(found) for metric, found in metric_values(runs).items()}
    return Summary(
        optimizer=optimizer,
        runs=len(runs),
        trials=len(trials),
        feasible=sum(trial.status == "feasible" for trial in trials),
        crashed=sum(trial.status == "crashed" for trial in trials),
        fast=spreads["fast"],
        consistency=spreads["consistency"],
        best_ms=spreads["best_ms"],
    )


def comparisons(runs: Runs) -> list[StudyComparison]:
    """Compares every other optimizer with ``random``, or without it, with the first by name."""
    # Imported here: this import is slower than all others of a command.
    from scipy.stats import mannwhitneyu  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    baseline = BASELINE if BASELINE in runs else min(runs)
    base = metric_values(runs[baseline])
    found: list[StudyComparison] = []
    for optimizer in sorted(set(runs) - {baseline}):
        for metric, ours in metric_values(runs[optimizer]).items():
            theirs = base[metric]
            if not ours or not theirs:
                continue
            better = "less" if metric == "best_ms" else "greater"
            p_better, p_two_sided = (
                float(mannwhitneyu(ours, theirs, alternative=side).pvalue)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
                for side in (better, "two-sided")
            )
            mine, other = _spread(ours), _spread(theirs)
            tighter = other.sd / mine.sd if mine and other and mine.sd > 0 else None
            found.append(StudyComparison(metric, optimizer, baseline, p_better, p_two_sided, tighter))
    return found


def _spread(found: Sequence[float]) -> Spread | None:
    if not found:
        return None
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))
