"""Breaks down a run's wall-clock time by activity. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.record.trial import Trial


@dataclass(frozen=True)
class TimeBreakdown:
    """Seconds by activity, over ``trials`` that ran; ``deciding`` is everything else: search, guard, journal, and the
    gap of an interrupted run.
    """

    trials: int
    starting: float
    warming_up: float
    measuring: float
    stopping: float
    deciding: float

    @property
    def total(self) -> float:
        """The run's wall-clock time."""
        return self.starting + self.warming_up + self.measuring + self.stopping + self.deciding


def spent(trials: Sequence[Trial], now: float) -> TimeBreakdown:
    """The breakdown from the start of the first of ``trials`` to ``now``, seconds since the epoch.

    A failed start counts as start time. For a trial that was aborted or crashed under load, only the total is known:
    time beyond what was recorded counts as measuring.
    """
    ran = [t for t in trials if not t.plan.refusal]
    parts = [_parts(t, now) for t in ran]
    starting, warming_up, measuring, stopping = (sum(part[n] for part in parts) for n in range(4))
    total = now - min((t.started_at for t in trials), default=now)
    deciding = max(total - starting - warming_up - measuring - stopping, 0.0)
    return TimeBreakdown(len(ran), starting, warming_up, measuring, stopping, deciding)


def _parts(trial: Trial, now: float) -> tuple[float, float, float, float]:
    whole = (trial.ended_at if trial.ended_at is not None else now) - trial.started_at
    result = trial.result
    if result is None:
        return 0.0, 0.0, whole, 0.0
    start_s, stop_s = result.start_s, result.stop_s or 0.0
    warmup_s = (result.warmup_s or 0.0) + (result.warm_start_s or 0.0)
    if start_s is None:
        return whole - stop_s, 0.0, 0.0, stop_s
    if result.load_s is None:
        return start_s, warmup_s, max(whole - start_s - warmup_s - stop_s, 0.0), stop_s
    return start_s, warmup_s, result.load_s, stop_s
