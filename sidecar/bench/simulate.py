"""One simulated tuning run on a landscape, with the steps of sidecar.run.tuning_run: ask, guard, measure, judge, tell.

If a landscape returns single requests, the load is played under the sidecar's stop rules and judged by its judge, and
the optimizer gets the trial's own observation. Noise depends only on the seed and the trial number, so it is the same
for all optimizers.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from sidecar.bench.landscape import Host, Landscape, LandscapeVerdict
from sidecar.bench.played_load import ServedLoad, played
from sidecar.config.schema import Objective, Workload
from sidecar.measure.early_stop import NO_NEEDS, SearchNeeds
from sidecar.measure.load_schedule import LoadSchedule, RateLoad
from sidecar.measure.measurement import measure
from sidecar.measure.requests import to_the_end
from sidecar.measure.verdict import violation
from sidecar.record.trial import Plan, Result, Role, Trial
from sidecar.run.judging import judged_loads
from sidecar.search.contract import Context, Observation, ObservedStatus, Projection
from sidecar.search.failed_configs import MAX_REFUSALS_IN_A_ROW
from sidecar.search.recommendation import Recommendation, luckiest, may_repeat, raised_bar, recommended
from sidecar.search.registry import chooses_the_luckiest, make
from vllm_sloguard.crash import Category, Crash
from vllm_sloguard.guard import memory, model_shape
from vllm_sloguard.guard.evidence import ModelEvidence
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB
from vllm_sloguard.guard.model_shape import ModelShape
from vllm_sloguard.guard.repair import repair
from vllm_sloguard.knobs import KnobValues, Value

_NOISE, _AGAIN = 0, 1  # random streams: for the run, and for re-measuring its choice
_CONFIDENCE = 0.98  # of the sequential test; the sidecar's default


@dataclass(frozen=True)
class SimulatedTrial:
    """One trial that ran. ``config`` is what ran, after repair; ``measured_s`` the duration of its load in seconds.

    If the load was stopped early (not ``whole``), latency and violation are estimates.
    """

    config: KnobValues
    verdict: LandscapeVerdict
    phase: str
    reason: str
    measured_s: float = 0.0
    whole: bool = True

    @property
    def latency_ms(self) -> float:
        """The latency of a complete load that met the SLO; infinite otherwise."""
        return self.estimated_ms if self.whole else math.inf

    @property
    def estimated_ms(self) -> float:
        """The same, but including stopped loads that were going to meet the SLO."""
        latency_ms = self.verdict.latency_ms
        feasible = self.verdict.outcome is ObservedStatus.FEASIBLE
        return latency_ms if feasible and latency_ms is not None else math.inf


@dataclass(frozen=True)
class SimulatedRun:
    """A simulated tuning run.

    ``chosen`` is the index of the candidate, None if no complete load met the SLO. Its configuration is re-measured:
    ``served_feasible`` is the share of re-measurements that met the SLO, ``served_ms`` their mean latency, None if
    there are none.
    """

    landscape: str
    optimizer: str
    seed: int
    trials: tuple[SimulatedTrial, ...]
    refused: int
    served_ms: float | None
    served_feasible: float | None
    chosen: int | None = None

    @property
    def best(self) -> SimulatedTrial | None:
        """The candidate's trial."""
        return None if self.chosen is None else self.trials[self.chosen]


# A landscape states the sizes of its model exactly, as a start would report them.
_ESTIMATE = partial(memory.estimate, evidence=ModelEvidence(reported=True))


class SimulatedGuard:
    """The plugin's repair pass over ``host``. Without ``enabled`` everything passes unchanged."""

    def __init__(self, landscape: Landscape, *, enabled: bool = True) -> None:
        self._landscape = landscape
        self._enabled = enabled
        self._shape, self._machine = landscape_shape(landscape.host), machine_of(landscape.host)
        self._pinned = frozenset(landscape.incumbent) - frozenset(landscape.space.by_name)

    def plan(self, config: KnobValues) -> tuple[dict[str, Value], str, int | None]:
        """``config`` applied to the incumbent's arguments, the refusal, and the KV tokens that fit."""
        args: dict[str, Value] = {**self._landscape.incumbent, **config}
        if not self._enabled:
            return args, "", None
        needed = self._landscape.host.max_len_needed
        result = repair(
            args,
            self._shape,
            self._machine,
            pinned=self._pinned,
            workload_max_len=needed,
            estimate=_ESTIMATE,
        )
        for change in result.changes:
            if change.after is None:
                args.pop(change.name, None)
            else:
                args[change.name] = change.after
        return args, result.refusal, result.budget.kv_tokens if result.budget else None

    def project(self, config: KnobValues) -> Projection:
        """The optimizer's context."""
        args, refusal, kv_tokens = self.plan(config)
        return Projection(self.knobs(args), refusal, kv_tokens)

    def knobs(self, args: KnobValues) -> dict[str, Value]:
        """The searchable subset of ``args``."""
        return {name: args[name] for name in self._landscape.space.by_name if name in args}


def landscape_shape(host: Host) -> ModelShape | None:
    """The model as stated by ``host``; None if it is not."""
    if host.weights_gib is None or host.kv_bytes_per_token is None:
        return None
    return model_shape.stated(round(host.weights_gib * GIB), host.kv_bytes_per_token)


def machine_of(host: Host) -> Machine | None:
    """The card as stated by ``host``; unstated memory counts as free."""
    if host.gpu_total_gib is None:
        return None
    free = host.gpu_total_gib if host.gpu_free_gib is None else host.gpu_free_gib
    return Machine("cuda", round(host.gpu_total_gib * GIB), round(free * GIB), 1, "landscape")


@dataclass(frozen=True)
class SimulationOptions:
    """``guarded``: configurations pass the repair. ``whole_loads``: no load is stopped early.

    The candidate is re-measured ``remeasurements`` times, to separate merit from luck.
    """

    budget: int
    guarded: bool = True
    whole_loads: bool = False
    remeasurements: int = 20


def simulate(landscape: Landscape, optimizer: str, seed: int, options: SimulationOptions) -> SimulatedRun:
    """A run of ``budget`` trials; refusals cost none. Raises LandscapeError, ValueError."""
    guard = SimulatedGuard(landscape, enabled=options.guarded)
    context = Context(
        incumbent=guard.knobs(landscape.incumbent) or None,
        longest_request_tokens=landscape.host.max_len_needed,
        project=guard.project if options.guarded else None,
        limits=landscape.slo,
    )
    searcher = make(optimizer, landscape.space, seed, options.budget, context)
    choose = luckiest if chooses_the_luckiest(optimizer) else recommended
    history: list[Observation] = []
    trials: list[SimulatedTrial] = []
    ran: list[int] = []  # each trial's index in the history
    scores: list[tuple[float, ...]] = []
    choice: Recommendation | None = None
    refused = in_a_row = 0
    while len(trials) < options.budget and in_a_row < MAX_REFUSALS_IN_A_ROW:
        proposal = searcher.ask(history)
        args, refusal, _ = guard.plan(proposal.config)
        if refusal:
            history.append(Observation(dict(proposal.config), ObservedStatus.REFUSED, float("inf"), None))
            refused, in_a_row = refused + 1, in_a_row + 1
            continue
        in_a_row = 0
        rng = np.random.default_rng([seed, _NOISE, len(trials)])
        repeatable = may_repeat(len(trials), options.budget)
        needs = _needs(history, ran, scores, choice, guard.knobs(args), repeatable=repeatable)
        baseline = proposal.phase == "incumbent"
        measured = _measured(landscape, guard, args, rng, None if options.whole_loads else (needs, baseline))
        history.append(measured.observation)
        ran.append(len(history) - 1)
        scores.append(measured.scores)
        trials.append(replace(measured.trial, phase=proposal.phase, reason=proposal.reason))
        if landscape.serves and not options.whole_loads:  # input to the stop rules
            choice = choose(landscape.space, history)
    choice = choose(landscape.space, history)
    run = SimulatedRun(landscape.name, optimizer, seed, tuple(trials), refused, None, None)
    if choice is None:
        return run
    chosen = ran.index(choice.index)
    return replace(run, chosen=chosen, **_again(landscape, trials[chosen].config, seed, options.remeasurements))


def _needs(
    history: list[Observation],
    ran: list[int],
    scores: list[tuple[float, ...]],
    choice: Recommendation | None,
    config: KnobValues,
    *,
    repeatable: bool,
) -> SearchNeeds:
    """As sidecar.run.judging.needs_after."""
    met = [o.config for o in history if o.outcome is ObservedStatus.FEASIBLE]
    # A repeat is to be measured to its end.
    if choice is None or not choice.worth_beating or config in met:
        return SearchNeeds(bool(met))
    best = ran.index(choice.index)
    return SearchNeeds(True, best + 1, scores[best], *raised_bar(history, choice.index), may_repeat=repeatable)


@dataclass(frozen=True)
class _Measured:
    observation: Observation
    trial: SimulatedTrial
    scores: tuple[float, ...] = ()


def _measured(
    landscape: Landscape,
    guard: SimulatedGuard,
    args: dict[str, Value],
    rng: np.random.Generator,
    early_stop: tuple[SearchNeeds, bool] | None,
) -> _Measured:
    """One trial. ``early_stop``: what the search needs from it, and whether it is the baseline; None: complete load."""
    if not landscape.serves:
        verdict = landscape.evaluate(args, rng)
        value = None if verdict.latency_ms is None else -verdict.latency_ms
        observation = Observation(guard.knobs(args), verdict.outcome, verdict.violation, value, verdict.margins)
        return _Measured(observation, SimulatedTrial(args, verdict, "", ""))
    served = landscape.serve(args, rng)
    timing = Result(start_s=served.start_s)
    if served.crashed:
        load_s, result = served.whole_s, replace(timing, crash=_crash(served))
    else:
        schedule = _schedule(landscape, served, early_stop)
        load = played(served, to_the_end if early_stop is None else schedule.stop_rule(served.rate))
        load_s = load.duration_s
        result = judged_loads(timing, (RateLoad(served.rate, load),), schedule)
    trial = Trial(1, 1, Plan(Role.SEARCH, {}, dict(args), "", ""), 0.0, served.start_s + load_s, result)
    observation = trial.observation(tuple(landscape.space.by_name), landscape.objectives)
    assert observation is not None
    verdict = LandscapeVerdict(
        observation.outcome,
        served.crash_kind,
        None if observation.value is None else -observation.value,
        observation.violation,
        observation.margins,
        served.start_s + load_s,
    )
    whole = not result.stopped
    return _Measured(observation, SimulatedTrial(args, verdict, "", "", load_s, whole), result.scores)


def _schedule(landscape: Landscape, served: ServedLoad, early_stop: tuple[SearchNeeds, bool] | None) -> LoadSchedule:
    needs, baseline = early_stop or (NO_NEEDS, False)
    workload = Workload.model_construct(
        rate=served.rate, requests=served.planned, output_tokens=served.most_gaps + 1, spread=0.0
    )
    return LoadSchedule(landscape.objectives, workload, Objective.LATENCY, _CONFIDENCE, thorough=baseline, needs=needs)


def _crash(served: ServedLoad) -> Crash:
    """The crash in the sidecar's types; the search does not distinguish kinds."""
    known = {str(category): category for category in Category}
    category = known.get(served.crash_kind, Category.ENGINE_DEATH)
    return Crash(category, served.crash_kind, "", served.crash_phase, None)


def _again(landscape: Landscape, config: KnobValues, seed: int, times: int) -> dict[str, Any]:
    """Complete loads of ``config`` on new starts, with their own noise."""
    if not times:
        return {}
    latencies: list[float] = []
    for number in range(times):
        rng = np.random.default_rng([seed, _AGAIN, number])
        latency_ms = whole_load_ms(landscape, config, rng)
        latencies += [] if latency_ms is None else [latency_ms]
    served_ms = float(np.mean(latencies)) if latencies else None
    return {"served_ms": served_ms, "served_feasible": len(latencies) / times}


def whole_load(landscape: Landscape, config: KnobValues, rng: np.random.Generator) -> LandscapeVerdict:
    """The verdict on one complete load."""
    return _measured(landscape, SimulatedGuard(landscape), dict(config), rng, None).trial.verdict


def whole_load_ms(landscape: Landscape, config: KnobValues, rng: np.random.Generator) -> float | None:
    """The mean latency of one complete load; None if it crashed or missed the SLO."""
    if not landscape.serves:
        verdict = landscape.evaluate(config, rng)
        return verdict.latency_ms if verdict.outcome is ObservedStatus.FEASIBLE else None
    served = landscape.serve(config, rng)
    if served.crashed:
        return None
    measurement = measure(played(served, to_the_end), landscape.objectives)
    return None if violation(measurement, landscape.objectives) else measurement.e2e_mean_ms
