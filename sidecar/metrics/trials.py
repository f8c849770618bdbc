"""Metrics of the trials: what became of each, and the last one beside the incumbent and the best."""

import math
from collections.abc import Sequence
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sidecar.config.schema import Objective
from sidecar.metrics.engine import TRAFFIC
from sidecar.metrics.window import DURATION_BUCKETS_S
from sidecar.promote.decision import baseline
from sidecar.record.trial import Trial, TrialStatus
from vllm_sloguard.crash import Category, Crash

# Which trial a value is of; the trials' numbers would be labels without end.
_SHOWN = ("last", "incumbent", "best")
_P99S = ("ttft", "itl", "e2e")
_ENDS = tuple(status for status in TrialStatus if status is not TrialStatus.RUNNING)


class TrialMetrics:
    """Fed by the loop, on its thread."""

    def __init__(self, registry: CollectorRegistry, budget: int, objective: Objective) -> None:
        self._budget = budget
        self._objective = objective
        self._define_counts(registry)
        self._define_measurements(registry)

    def _define_counts(self, reg: CollectorRegistry) -> None:
        self._trials = Counter("sloguard_trials", "Trials, by what became of them.", ["status"], registry=reg)
        self._durations = Histogram(
            "sloguard_trial_duration_seconds",
            "How long trials took, from the plan to the verdict.",
            ["status"],
            buckets=DURATION_BUCKETS_S,
            registry=reg,
        )
        for status in _ENDS:
            self._trials.labels(str(status))
            self._durations.labels(str(status))
        self._number = Gauge(
            "sloguard_trial_number", "Number, in its run, of the trial that runs; 0 where none does.", registry=reg
        )
        Gauge("sloguard_budget_trials", "Trials that a run may try.", registry=reg).set(self._budget)
        self._left = Gauge("sloguard_budget_remaining_trials", "Trials that the run may still try.", registry=reg)
        self._left.set(self._budget)
        self._crashes = Counter(
            "sloguard_crashes", "Crashes of engines.", ["category", "phase", "traffic"], registry=reg
        )
        for category, phase, traffic in product(Category, ("starting", "serving"), TRAFFIC):
            self._crashes.labels(str(category), phase, traffic)

    def _define_measurements(self, reg: CollectorRegistry) -> None:
        about = "of the last trial, the incumbent's and the best feasible one"
        self._p99 = Gauge(
            "sloguard_trial_p99_seconds", f"99th percentiles {about}.", ["latency", "trial"], registry=reg
        )
        self._mean = Gauge("sloguard_trial_e2e_mean_seconds", f"Mean latency {about}.", ["trial"], registry=reg)
        self._goodput = Gauge(
            "sloguard_trial_goodput_requests_per_second",
            f"Requests that met the SLO, by time, {about}; the capacity where that is the objective.",
            ["trial"],
            registry=reg,
        )
        for shown in _SHOWN:
            for latency in _P99S:
                self._p99.labels(latency, shown).set(math.nan)
            self._mean.labels(shown).set(math.nan)
            self._goodput.labels(shown).set(math.nan)

    def trial(self, trial: Trial, trials: Sequence[Trial]) -> None:
        """Takes a trial that has started or ended; ``trials`` are all of its run."""
        ran = sum(t.status not in (TrialStatus.REFUSED, TrialStatus.ABORTED, TrialStatus.RUNNING) for t in trials)
        self._left.set(max(self._budget - ran, 0))
        if trial.status is TrialStatus.RUNNING:
            self._number.set(trial.number)
            return
        self._number.set(0)
        self._trials.labels(str(trial.status)).inc()
        if trial.ended_at is not None:
            self._durations.labels(str(trial.status)).observe(max(trial.ended_at - trial.started_at, 0.0))
        if trial.result is None:
            return
        if trial.result.crash is not None:
            self.crashed(trial.result.crash, "trial")
        feasible = [t for t in trials if t.status is TrialStatus.FEASIBLE and t.result and t.result.value is not None]
        best = max(feasible, key=_value, default=None)
        for name, shown in zip(_SHOWN, (trial, baseline(trials), best), strict=True):
            self._show(name, shown)

    def _show(self, name: str, trial: Trial | None) -> None:
        """NaN for what was not measured, so that an older trial's value does not stay."""
        result = trial.result if trial is not None else None
        measured = result.measurement if result is not None else None
        p99s_ms = (measured.ttft_p99_ms, measured.itl_p99_ms, measured.e2e_p99_ms) if measured else (None,) * 3
        for latency, p99_ms in zip(_P99S, p99s_ms, strict=True):
            self._p99.labels(latency, name).set(_seconds(p99_ms))
        self._mean.labels(name).set(_seconds(measured.e2e_mean_ms if measured else None))
        goodput = measured.goodput_rps if measured and result and not result.stopped else math.nan
        if self._objective is Objective.CAPACITY and result is not None:
            goodput = math.nan if result.value is None else result.value
        self._goodput.labels(name).set(goodput)

    def crashed(self, crash: Crash, traffic: str) -> None:
        """Takes a crash of the "serving" engine or of a "trial" one."""
        self._crashes.labels(str(crash.category), crash.phase, traffic).inc()


def _value(trial: Trial) -> float:
    return trial.result.value if trial.result and trial.result.value is not None else -math.inf


def _seconds(ms: float | None) -> float:
    return math.nan if ms is None else ms / 1000
