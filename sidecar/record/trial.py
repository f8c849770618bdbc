"""The record of one trial; its status is derived from the record, never stored."""

import json
from dataclasses import field
from enum import StrEnum
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from sidecar.config.slo import Slo
from sidecar.measure.capacity_search import RateResult
from sidecar.measure.measurement import Measurement
from sidecar.measure.partial_load import LoadEstimate
from sidecar.measure.verdict import MAX_EXCESS, slo_limits
from sidecar.search.contract import Observation, ObservedStatus
from vllm_sloguard.crash import Crash
from vllm_sloguard.knobs import Value

_FROZEN = ConfigDict(ser_json_inf_nan="strings", extra="forbid")


class TrialStatus(StrEnum):
    """The status of a trial."""

    RUNNING = "running"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    CRASHED = "crashed"
    REFUSED = "refused"  # by the guard, before anything was started
    ABORTED = "aborted"  # the trial did not finish


class Role(StrEnum):
    """Why a trial was run."""

    BASELINE = "baseline"  # the incumbent, measured in the same run
    SEARCH = "search"
    UNGUARDED = "unguarded"  # requested by the operator, without the guard
    REFERENCE = "reference"  # the incumbent re-measured, on a start of its own
    VALIDATION = "validation"  # the candidate re-measured, on a start of its own
    LOWER_RATE = "lower_rate"  # the nearest miss again, to find the request rate at which it meets the SLO


# The trials that decide a promotion. Their engines start the way the serving engine does.
VALIDATING = (Role.REFERENCE, Role.VALIDATION)
AFTER_THE_SEARCH = (*VALIDATING, Role.LOWER_RATE)


class StartKind(StrEnum):
    """How a trial's engine was started."""

    ORDINARY = "ordinary"  # by its command line, as an operator would
    FORKED = "forked"  # from a process that had already imported vLLM
    LIVE = "live"  # the previous trial's engine, reconfigured while running


@dataclass(frozen=True, config=_FROZEN)
class RepairChange:
    """One argument changed by the repair; ``before`` is None if it was not set.

    ``rules`` are the names of the repair rules it violated.
    """

    name: str
    before: Value | None
    after: Value | None
    reason: str
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, config=_FROZEN)
class Plan:
    """What a trial runs, and why.

    ``proposed`` are the knobs proposed by the search, ``args`` all engine arguments to serve with; ``ceilings`` are
    higher values that the engine may be started with, to be lowered live. ``warning`` is why ``args`` may not start,
    though the guard passes them.
    """

    role: Role
    proposed: dict[str, Value]
    args: dict[str, bool | int | float | str | list[str]]
    phase: str
    reason: str
    changes: tuple[RepairChange, ...] = ()
    refusal: str = ""
    ceilings: dict[str, Value] = field(default_factory=dict[str, Value])
    warning: str = ""


@dataclass(frozen=True, config=_FROZEN)
class Result:
    """A trial's result: a measurement, a crash, or neither if it could not be measured.

    ``scores`` are the requests' contributions to the objective, lower is better (sidecar.measure.verdict.scores).
    ``tried`` are the tested rates, when capacity is the objective. ``repairs`` are the plugin's changes inside vLLM, if
    enabled; ``vllm_version`` is the engine's, empty if its plugin did not report it. If the load was stopped early,
    ``stopped`` says why, in words: the p99s and ``violation`` are then lower bounds, and ``estimate`` extrapolates the
    full load; a mean latency as the value is the estimated one.
    ``load_s`` are the seconds of the loads, without ``warmup_s``.
    """

    violation: float = 0.0
    value: float | None = None
    measurement: Measurement | None = None
    scores: tuple[float, ...] = ()
    tried: tuple[RateResult, ...] = ()
    stopped: str = ""
    unmeasured: str = ""
    estimate: LoadEstimate | None = None
    crash: Crash | None = None
    repairs: tuple[RepairChange, ...] = ()
    kv_cache_tokens: int | None = None
    vllm_version: str = ""
    start: StartKind = StartKind.ORDINARY
    start_s: float | None = None
    warmup_s: float | None = None
    warmup_requests: int | None = None
    load_s: float | None = None
    stop_s: float | None = None
    warm_start_s: float | None = None

    @property
    def value_is_lower_bound(self) -> bool:
        """Whether the value is a capacity whose highest tested rate still met the SLO."""
        return bool(self.tried) and all(load.met for load in self.tried)


@dataclass(frozen=True, config=_FROZEN)
class Trial:
    """One row of the journal. Times are seconds since the epoch."""

    run: int
    number: int
    plan: Plan
    started_at: float
    ended_at: float | None = None
    result: Result | None = None

    @property
    def status(self) -> TrialStatus:
        """Derived from the record."""
        if self.plan.refusal:
            return TrialStatus.REFUSED
        if self.ended_at is None:
            return TrialStatus.RUNNING
        if self.result is None or self.result.unmeasured:
            return TrialStatus.ABORTED
        if self.result.crash is not None:
            return TrialStatus.CRASHED
        return TrialStatus.FEASIBLE if self.result.violation == 0 else TrialStatus.INFEASIBLE

    @property
    def args_that_ran(self) -> dict[str, bool | int | float | str | list[str]]:
        """The engine's arguments after both repairs; for a refused trial, the knobs as proposed."""
        if self.plan.refusal:
            return dict(self.plan.proposed)
        repairs = self.result.repairs if self.result is not None else ()
        return {**self.plan.args, **{change.name: change.after for change in repairs if change.after is not None}}

    def observation(self, knobs: tuple[str, ...], slo: Slo | None = None) -> Observation | None:
        """The optimizer's observation: the knobs as they ran and, with ``slo``, the margin to each limit.

        None for a trial that carries no information about them.
        """
        outcome = {
            TrialStatus.FEASIBLE: ObservedStatus.FEASIBLE,
            TrialStatus.INFEASIBLE: ObservedStatus.INFEASIBLE,
            TrialStatus.CRASHED: ObservedStatus.CRASHED,
            TrialStatus.REFUSED: ObservedStatus.REFUSED,
        }.get(self.status)
        if outcome is None:
            return None
        config = {name: v for name, v in self.args_that_ran.items() if name in knobs and not isinstance(v, list)}
        if self.result is None or outcome is ObservedStatus.CRASHED:
            return Observation(config, outcome, float("inf"), None)
        measured = self.result.measurement
        known = margins(measured, slo, bounds=bool(self.result.stopped)) if slo and measured else None
        estimate = self.result.estimate
        if estimate is None or known is None:
            bounds = frozenset(known or ()) if self.result.stopped else frozenset[str]()
            return Observation(config, outcome, self.result.violation, self.result.value, known, bounds=bounds)
        return Observation(
            config,
            outcome,
            max(self.result.violation, estimate.violation) if self.result.violation else 0.0,
            self.result.value,
            {limit.name: max(min(limit.margin, MAX_EXCESS), known.get(limit.name, -1.0)) for limit in estimate.limits},
            margin_sds={limit.name: limit.sd for limit in estimate.limits},
            value_sd=estimate.mean_sd,
        )


def margins(measurement: Measurement, slo: Slo, *, bounds: bool = False) -> dict[str, float]:
    """By limit, (measured - limit) / limit; Limit.excess where the limit was missed, unmeasured, or is 0.

    With lower ``bounds``, only missed limits are included: the others are undetermined.
    """
    found = slo_limits(measurement, slo)
    if bounds:
        return {limit.name: limit.excess for limit in found if limit.measured is not None and limit.excess}
    return {
        limit.name: limit.excess or (0.0 if not limit.limit else ((limit.measured or 0.0) - limit.limit) / limit.limit)
        for limit in found
    }


PLAN = TypeAdapter(Plan)
RESULT = TypeAdapter(Result)
_TRIAL = TypeAdapter(Trial)


def trial_as_json(trial: Trial) -> dict[str, Any]:
    """For `sloguard trials --json`: everything but the requests' scores, in field units.

    ``value`` is the objective's own figure: milliseconds or requests per second. The journal has latencies negative,
    so that more is always better.
    """
    row = json.loads(_TRIAL.dump_json(trial))
    if row["result"] is not None:
        del row["result"]["scores"]
        value = row["result"]["value"]
        row["result"]["value"] = abs(value) if isinstance(value, int | float) else value
    return {"run": row.pop("run"), "number": row.pop("number"), "status": str(trial.status), **row}
