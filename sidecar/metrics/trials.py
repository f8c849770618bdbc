"""Metrics of the trials: their states, and what the last, the incumbent's and the best one measured."""

import math
from collections.abc import Mapping, Sequence
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sidecar.config.schema import Objective
from sidecar.config.slo import LatencyKind, LatencyStatistic, Statistic
from sidecar.metrics.engine import TRAFFIC
from sidecar.metrics.window import DURATION_BUCKETS_S
from sidecar.promote.candidate import baseline
from sidecar.record.trial import Role, Trial, TrialStatus
from sidecar.record.trial_states import RAN_STATUSES
from vllm_sloguard.crash import Category, Crash

# Label values: the numbers of trials would be unbounded.
_SHOWN = ("last", "incumbent", "best")
_P99S = tuple(LatencyStatistic(kind, Statistic.P99) for kind in LatencyKind)
_ENDS = tuple(status for status in TrialStatus if status is not TrialStatus.RUNNING)


class TrialMetrics:
    """Fed by the loop, on its thread."""

    def __init__(self, registry: CollectorRegistry, budget: int, objective: Objective) -> None:
        self._budget = budget
        self._objective = objective
        self._define_counts(registry)
        self._define_measurements(registry)

    def _define_counts(self, reg: CollectorRegistry) -> None:
        self._trials = Counter("sloguard_trials", "Trials by state.", ["status"], registry=reg)
        self._durations = Histogram(
            "sloguard_trial_duration_seconds",
            "Duration of trials, from the plan to the result.",
            ["status"],
            buckets=DURATION_BUCKETS_S,
            registry=reg,
        )
        for status in _ENDS:
            self._trials.labels(str(status))
            self._durations.labels(str(status))
        self._number = Gauge(
            "sloguard_trial_number", "Number of the running trial in its run; 0 if none is running.", registry=reg
        )
        Gauge("sloguard_budget_trials", "Budget of a run, in trials.", registry=reg).set(self._budget)
        self._left = Gauge("sloguard_budget_remaining_trials", "Trials left in the budget of the run.", registry=reg)
        self._left.set(self._budget)
        self._crashes = Counter("sloguard_crashes", "Engine crashes.", ["category", "phase", "traffic"], registry=reg)
        for category, phase, traffic in product(Category, ("starting", "serving"), TRAFFIC):
            self._crashes.labels(str(category), phase, traffic)

    def _define_measurements(self, reg: CollectorRegistry) -> None:
        about = "of the last trial, the incumbent's, and the best feasible one"
        self._p99 = Gauge("sloguard_trial_p99_seconds", f"p99 latency {about}.", ["latency", "trial"], registry=reg)
        self._mean = Gauge("sloguard_trial_e2e_mean_seconds", f"Mean E2E latency {about}.", ["trial"], registry=reg)
        self._goodput = Gauge(
            "sloguard_trial_goodput_requests_per_second",
            f"Goodput {about}; the capacity if that is the objective.",
            ["trial"],
            registry=reg,
        )
        self.meets_slo = Gauge(
            "sloguard_current_configuration_meets_slo",
            "Whether the current configuration met the SLO when a window last measured it; NaN if not measured.",
            registry=reg,
        )
        self.meets_slo.set(math.nan)
        # Whether a configuration met the SLO when it was last measured, of the configurations of the last run.
        self._met: dict[frozenset[tuple[str, str]], bool] = {}
        for shown in _SHOWN:
            for latency in _P99S:
                self._p99.labels(str(latency.kind), shown).set(math.nan)
            self._mean.labels(shown).set(math.nan)
            self._goodput.labels(shown).set(math.nan)

    def serving(self, args: Mapping[str, object]) -> None:
        """Takes the configuration that is served from now on."""
        self.meets_slo.set(self._met.get(_configuration(args), math.nan))

    def trial(self, trial: Trial, trials: Sequence[Trial]) -> None:
        """Takes a trial that has started or ended; ``trials`` are all of its run."""
        ran = sum(t.status in RAN_STATUSES for t in trials)
        self._left.set(max(self._budget - ran, 0))
        if trial.status is TrialStatus.RUNNING:
            self._number.set(trial.number)
            return
        self._number.set(0)
        if trial.status in RAN_STATUSES:
            if len(trials) == 1:
                self._met.clear()
            self._met[_configuration(trial.args_that_ran)] = trial.status is TrialStatus.FEASIBLE
        if trial.plan.role in (Role.BASELINE, Role.REFERENCE) and trial.status in RAN_STATUSES:
            self.meets_slo.set(trial.status is TrialStatus.FEASIBLE)
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
        """What was not measured is NaN, not the value of an earlier trial."""
        result = trial.result if trial is not None else None
        measured = result.measurement if result is not None else None
        for latency in _P99S:
            p99_ms = measured.latency_ms(latency) if measured else None
            self._p99.labels(str(latency.kind), name).set(_seconds(p99_ms))
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


def _configuration(args: Mapping[str, object]) -> frozenset[tuple[str, str]]:
    """What tells one configuration from another; an argument of None is one that was not given."""
    return frozenset((name, repr(value)) for name, value in args.items() if value is not None)
