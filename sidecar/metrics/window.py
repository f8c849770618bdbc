"""Metrics of states and windows: what the sidecar is doing, and how the time of windows is spent."""

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info

from sidecar.promote.probation import ProbationVerdict
from sidecar.record.decisions import DECIDED, Decision
from sidecar.record.events import WindowOutcome
from sidecar.record.states import Cause, State
from sidecar.record.time_breakdown import spent
from sidecar.record.trial import Trial, TrialStatus

# "decide" is the search, the guard and the journal between trials.
ACTIVITIES = ("drain", "decide", "start", "warmup", "load", "stop", "restore")
# Buckets from the drain of an idle engine to a trial of a large model.
DURATION_BUCKETS_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0)
_TRYING = (State.TUNING, State.VALIDATING)
_COMING_BACK = (State.PROMOTING, State.RESTORING)
# Unplanned restarts, and planned ones: the start after a window, whatever it led to.
_RESTART_REASONS = (Cause.ENGINE_CRASHED, Cause.ENGINE_HANGS, Cause.ROLLED_BACK)
_PLANNED_REASONS = (
    Cause.PROMOTED, Cause.KEPT, Cause.WINDOW_ABORTED, Cause.WINDOW_OUT_OF_TIME, Cause.WINDOW_FAILED
)  # fmt: skip


class WindowMetrics:
    """Fed by the loop, on its thread. ``clock`` is in monotonic seconds."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._now_in: State | None = None
        self._since = self._restoring_s = 0.0
        self._idle_since: float | None = None
        self._in_window = False
        self._define_state(registry)
        self._define_windows(registry)
        self._define_decisions(registry)

    def _define_state(self, reg: CollectorRegistry) -> None:
        self._state = Enum("sloguard_state", "What the sidecar is doing.", states=[str(s) for s in State], registry=reg)
        self._reason = Info(
            "sloguard_state_reason", "Why the sidecar entered its state, as an identifier.", registry=reg
        )
        self._entered_at = Gauge(
            "sloguard_state_entered_timestamp_seconds",
            "When the sidecar entered its state, in Unix time.",
            registry=reg,
        )
        self._restarts = Counter(
            "sloguard_engine_restarts", "Unplanned restarts of the serving engine.", ["reason"], registry=reg
        )
        for cause in _RESTART_REASONS:
            self._restarts.labels(str(cause))
        self._planned = Counter(
            "sloguard_engine_planned_restarts", "Starts of the serving engine after a window.", ["reason"], registry=reg
        )
        for cause in _PLANNED_REASONS:
            self._planned.labels(str(cause))
        self.epoch = Gauge("sloguard_controller_epoch", "Number of this controller; it only increases.", registry=reg)
        self.paused = Gauge("sloguard_paused", "Whether an operator has paused windows.", registry=reg)
        self.restore_expected = Gauge(
            "sloguard_restore_expected_seconds",
            "The longest of the last starts of a serving engine; before the first, engine.start_timeout.",
            registry=reg,
        )

    def _define_windows(self, reg: CollectorRegistry) -> None:
        self.windows = Counter("sloguard_windows", "Windows by outcome.", ["outcome"], registry=reg)
        for outcome in WindowOutcome:
            self.windows.labels(str(outcome))
        self.remaining = Gauge(
            "sloguard_window_remaining_seconds", "Time left in the window; 0 if none is open.", registry=reg
        )
        self.overrun = Gauge(
            "sloguard_window_overrun_seconds",
            "Time since the end of a window without vLLM serving again; 0 while it is serving.",
            registry=reg,
        )
        self._spent = Counter(
            "sloguard_window_spent_seconds",
            "Time spent in windows by activity, from the drain until vLLM serves again.",
            ["activity"],
            registry=reg,
        )
        for activity in ACTIVITIES:
            self._spent.labels(activity)
        self._drained = Histogram(
            "sloguard_drain_duration_seconds",
            "From the opening of a window until the engine has stopped: notice, hooks, requests in flight.",
            buckets=DURATION_BUCKETS_S,
            registry=reg,
        )
        self._restored = Histogram(
            "sloguard_restore_duration_seconds",
            "From the end of the trials, or from a crash, until vLLM serves again.",
            buckets=DURATION_BUCKETS_S,
            registry=reg,
        )

    def _define_decisions(self, reg: CollectorRegistry) -> None:
        self._decisions = Counter("sloguard_decisions", "Decisions of runs by outcome.", ["outcome"], registry=reg)
        for outcome in DECIDED:
            self._decisions.labels(str(outcome))
        self._gain = Gauge(
            "sloguard_decision_gain_ratio",
            "Gain of the candidate over the incumbent in the last decision; 0.1 is 10 %.",
            ["bound"],
            registry=reg,
        )
        for bound in ("estimate", "low", "high"):
            self._gain.labels(bound).set(math.nan)
        self._nearest_miss = Gauge(
            "sloguard_nearest_miss_excess_ratio",
            "Excess over the limit in the way, by the trial nearest to the SLO; absent if the last run met the SLO.",
            ["limit"],
            registry=reg,
        )
        self._nearest_miss_rate = Gauge(
            "sloguard_nearest_miss_highest_rate_requests_per_second",
            "Highest request rate at which that trial's configuration met the SLO; NaN if unknown.",
            registry=reg,
        )
        self._nearest_miss_rate.set(math.nan)
        self.probation_remaining = Gauge(
            "sloguard_probation_remaining_seconds",
            "Time left in the probation of a promotion; 0 without one.",
            registry=reg,
        )
        self.rollbacks = Counter(
            "sloguard_rollbacks",
            "Automatic rollbacks of promotions, by verdict of the probation.",
            ["verdict"],
            registry=reg,
        )
        for verdict in ProbationVerdict:
            if verdict not in (ProbationVerdict.GOES_ON, ProbationVerdict.PASSED):
                self.rollbacks.labels(str(verdict))

    def entered(self, state: State, cause: Cause | None) -> None:
        """Takes a change of state, or of the reason to be in it."""
        if cause is not None:
            self._reason.info({"state": str(state), "reason": str(cause)})
        before, now = self._now_in, self._clock()
        if state is before:
            return
        if before is not None:
            self._left(before, state, now)
        if state is State.RESTORING and cause in _RESTART_REASONS:
            self._restarts.labels(str(cause)).inc()
        elif state in _COMING_BACK and before not in _COMING_BACK and cause in _PLANNED_REASONS:
            self._planned.labels(str(cause)).inc()
        self._state.state(str(state))
        self._entered_at.set_to_current_time()
        self._now_in, self._since = state, now

    def _left(self, before: State, state: State, now: float) -> None:
        """Accounts for the time in ``before``."""
        took_s = now - self._since
        if before is State.DRAINING and state is not State.SERVING:
            self._in_window = True
            self._drained.observe(took_s)
            self._spent.labels("drain").inc(took_s)
        if state is State.TUNING:
            self._idle_since = now
        elif before in _TRYING and state not in _TRYING:
            self._decided_until(now)
        if before in _COMING_BACK:
            self._restoring_s += took_s
            if self._in_window:
                self._spent.labels("restore").inc(took_s)
        if state is State.SERVING:
            if self._restoring_s:
                self._restored.observe(self._restoring_s)
            self._restoring_s, self._in_window = 0.0, False

    def trial(self, trial: Trial) -> None:
        """Takes a trial that has started or ended."""
        self._decided_until(self._clock())
        if trial.status is TrialStatus.RUNNING:
            return
        self._idle_since = self._clock()
        if trial.ended_at is None:
            return
        took = spent([trial], trial.ended_at)
        parts = (took.deciding, took.starting, took.warming_up, took.measuring, took.stopping)
        for activity, seconds in zip(("decide", "start", "warmup", "load", "stop"), parts, strict=True):
            self._spent.labels(activity).inc(max(seconds, 0.0))

    def _decided_until(self, now: float) -> None:
        if self._idle_since is not None:
            self._spent.labels("decide").inc(now - self._idle_since)
        self._idle_since = None

    def decided(self, decision: Decision) -> None:
        """Takes the decision of a run."""
        self._decisions.labels(str(decision.outcome)).inc()
        for bound, gain in (("estimate", decision.gain), ("low", decision.low), ("high", decision.high)):
            self._gain.labels(bound).set(math.nan if gain is None else gain)
        miss = decision.nearest_miss
        self._nearest_miss.clear()
        if miss is not None:
            self._nearest_miss.labels(miss.limit).set(miss.excess)
        rate = miss.highest_rate if miss is not None else None
        self._nearest_miss_rate.set(math.nan if rate is None else rate)
