"""From the raw trial to the recorded result. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from sidecar.config.schema import Config, Objective
from sidecar.measure import verdict
from sidecar.measure.capacity_search import RateResult, capacity
from sidecar.measure.early_stop import NO_NEEDS, SearchNeeds
from sidecar.measure.load_schedule import LoadSchedule, RateLoad
from sidecar.measure.measurement import measure
from sidecar.measure.partial_load import EarlyStop
from sidecar.measure.sender_lag import sender_lag
from sidecar.measure.steady_state import SteadyState, overload
from sidecar.promote.candidate import Leader
from sidecar.record.trial import VALIDATING, Result, Role, Trial, TrialStatus
from sidecar.run.raw_trial import EngineRun, PluginReport, RawTrial
from vllm_sloguard.crash import Category, Crash

_MAX_EVIDENCE = 500  # characters
_MISSED_BEFORE = 1e-6  # violation of a trial that was not measured at the configured rate


def load_schedule(config: Config, role: Role, needs: SearchNeeds = NO_NEEDS) -> LoadSchedule:
    """The load schedule for a trial of that role; loads of the search end once they have given what it ``needs``."""
    lower = role is Role.LOWER_RATE
    return LoadSchedule(
        config.slo,
        config.workload,
        Objective.CAPACITY if lower else config.objective,
        config.promotion.confidence,
        compared=role in VALIDATING,
        thorough=role is Role.BASELINE,
        least_requests=config.promotion.requests_a_start,
        needs=needs,
        below=config.workload.rate if lower else None,
    )


def judged_result(raw: RawTrial, role: Role, config: Config) -> Result:
    """The result of a trial: a crash, a verdict, or the reason why nothing was measured."""
    run = raw.last
    result = Result(
        crash=run.crash and explained(run.crash, run.report),
        repairs=run.report.repairs,
        kv_cache_tokens=run.report.kv_cache_tokens,
        vllm_version=run.report.vllm_version,
        start=run.start,
        start_s=run.start_s,
        stop_s=run.stop_s,
        warm_start_s=raw.warm_start_s,
    )
    if run.crash is not None:
        return result
    if not run.settings_held:
        return replace(result, unmeasured="a live change of the engine did not last")
    result = _with_loads(result, run, load_schedule(config, role))
    return _at_lower_rates(result) if role is Role.LOWER_RATE else result


def _at_lower_rates(result: Result) -> Result:
    """The rates alone: at the configured rate, of which this trial has no load, the SLO was missed."""
    missed = result.violation or _MISSED_BEFORE
    return replace(result, violation=missed, value=None, measurement=None, scores=(), stopped="", estimate=None)


def explained(crash: Crash, report: PluginReport) -> Crash:
    """``crash``; if the log does not give the reason, with the exception that the plugin reported."""
    if crash.category is not Category.ENGINE_DEATH or not report.crashes:
        return crash
    first = report.crashes[0]
    evidence = f"{first.exception_type}: {first.message} ({first.context})"
    return replace(crash, evidence=" ".join(evidence.split())[:_MAX_EVIDENCE])


def _with_loads(result: Result, run: EngineRun, schedule: LoadSchedule) -> Result:
    """The load at the configured rate decides whether the SLO is met; for capacity, the best load gives the scores."""
    warm_up = run.loads[0].load.warm_up  # later loads run on a warm engine
    result = replace(
        result,
        warmup_s=warm_up.seconds,
        warmup_requests=warm_up.requests,
        load_s=run.loads_s - warm_up.seconds,
    )
    return judged_loads(result, run.loads, schedule)


def judged_loads(result: Result, loads: tuple[RateLoad, ...], schedule: LoadSchedule) -> Result:
    """``result`` with the verdict on ``loads``, of which there is at least one."""
    counted = schedule.counted(loads)
    if not counted or counted[0].rate != loads[0].rate:
        lag = sender_lag(loads[-1].load, schedule.slo)
        return replace(result, unmeasured=lag.reason if lag is not None else "no load counts as a measurement")
    tried = schedule.tried(loads) if schedule.objective is Objective.CAPACITY else ()
    ending = counted[0].load.ending
    if isinstance(ending, EarlyStop):
        return _stopped(result, ending, schedule, tried)
    return _measured(result, counted, schedule, tried)


def _stopped(result: Result, ending: EarlyStop, schedule: LoadSchedule, tried: tuple[RateResult, ...]) -> Result:
    """The verdict on a stopped load. Its mean latency is estimated; only an outperformed one may have met the SLO."""
    bound, estimate = verdict.least_violation(ending.bounds, schedule.slo), ending.estimate
    violation = bound or (estimate.violation if estimate is not None else 0.0)
    value = verdict.value(ending.bounds, schedule.objective, tried) if tried else None
    if schedule.objective is Objective.LATENCY and estimate is not None and estimate.mean_ms is not None:
        value = -estimate.mean_ms
    return replace(
        result,
        violation=violation,
        value=value,
        measurement=ending.bounds,
        tried=tried,
        stopped=ending.why,
        estimate=estimate,
    )


def _measured(
    result: Result, counted: tuple[RateLoad, ...], schedule: LoadSchedule, tried: tuple[RateResult, ...]
) -> Result:
    slo, objective = schedule.slo, schedule.objective
    first = counted[0].load
    measurement = measure(first, slo)
    violation = verdict.violation(measurement, slo)
    if tried and violation == 0 and measurement.steady is SteadyState.GROWING:
        violation = overload(first)  # it meets the SLO only because the load was short
    reached = capacity(tried)
    best = next((d.load for d in counted if d.rate == reached), first)
    return replace(
        result,
        violation=violation,
        value=verdict.value(measurement, objective, tried),
        measurement=measurement,
        scores=verdict.scores(best, slo, objective),
        tried=tried,
    )


def needs_after(
    trials: Sequence[Trial], objective: Objective, best: Leader | None, *, may_repeat: bool = False
) -> SearchNeeds:
    """What the search needs after ``trials``; ``best`` is what the next one has to beat, None if in doubt."""
    feasible = any(t.status is TrialStatus.FEASIBLE and t.plan.role in (Role.BASELINE, Role.SEARCH) for t in trials)
    if best is None or best.trial.result is None or objective is not Objective.LATENCY:
        return SearchNeeds(feasible)
    scores = best.trial.result.scores
    return SearchNeeds(feasible, best.trial.number, scores, best.bar, best.bar_sd, may_repeat)
