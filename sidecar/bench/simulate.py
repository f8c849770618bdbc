"""One tuning run on a landscape, as sidecar.run.tuning_run makes it: ask, guard, evaluate, judge, tell.

The noise of a trial depends on the seed and the trial's number alone, so that every optimizer meets the same.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from sidecar.bench.landscape import Host, Landscape, LandscapeVerdict
from sidecar.search.contract import Context, Observation, ObservedStatus, Projection
from sidecar.search.failed_configs import MOST_REFUSALS_IN_A_ROW
from sidecar.search.registry import make
from vllm_sloguard.guard import model_shape
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB
from vllm_sloguard.guard.model_shape import ModelShape
from vllm_sloguard.guard.repair import repair
from vllm_sloguard.knobs import KnobValues, Value

_NOISE, _AGAIN = 0, 1  # the streams of random numbers: of the run, and of serving what it chose
# How often the configuration that a run chose is evaluated again, to tell merit from luck.
_EVALUATIONS_AGAIN = 8


@dataclass(frozen=True)
class SimulatedTrial:
    """One trial that ran. ``config`` is what ran, after repair."""

    config: KnobValues
    verdict: LandscapeVerdict
    phase: str
    reason: str

    @property
    def latency_ms(self) -> float:
        """Of a feasible trial; infinite for any other."""
        latency_ms = self.verdict.latency_ms
        return math.inf if self.verdict.outcome is not ObservedStatus.FEASIBLE or latency_ms is None else latency_ms


@dataclass(frozen=True)
class SimulatedRun:
    """A simulated tuning run.

    ``served_ms`` is the mean latency of the best trial's configuration evaluated again, ``served_feasible`` the share
    of those evaluations that met the SLO; ``None`` without a feasible trial, or without one among the evaluations.
    """

    landscape: str
    optimizer: str
    seed: int
    trials: tuple[SimulatedTrial, ...]
    refused: int
    served_ms: float | None
    served_feasible: float | None

    @property
    def best(self) -> SimulatedTrial | None:
        """The feasible trial of the lowest latency, which is the one that would be validated."""
        best = min(self.trials, key=lambda trial: trial.latency_ms, default=None)
        return best if best is not None and best.verdict.outcome is ObservedStatus.FEASIBLE else None


class SimulatedGuard:
    """The plugin's repair pass over ``host``. Without ``enabled`` everything passes as it is."""

    def __init__(self, landscape: Landscape, *, enabled: bool = True) -> None:
        self._landscape = landscape
        self._enabled = enabled
        self._shape, self._machine = landscape_shape(landscape.host), machine_of(landscape.host)
        self._pinned = frozenset(landscape.incumbent) - frozenset(landscape.space.by_name)

    def plan(self, config: KnobValues) -> tuple[dict[str, Value], str, int | None]:
        """The arguments that ``config`` comes to over the incumbent's, the refusal, and the KV tokens that fit."""
        args: dict[str, Value] = {**self._landscape.incumbent, **config}
        if not self._enabled:
            return args, "", None
        needed = self._landscape.host.max_len_needed
        result = repair(args, self._shape, self._machine, pinned=self._pinned, workload_max_len=needed)
        for change in result.changes:
            if change.after is None:
                args.pop(change.name, None)
            else:
                args[change.name] = change.after
        return args, result.refusal, result.budget.kv_tokens if result.budget else None

    def project(self, config: KnobValues) -> Projection:
        """What an optimizer is told in advance."""
        args, refusal, kv_tokens = self.plan(config)
        return Projection(self.knobs(args), refusal, kv_tokens)

    def knobs(self, args: KnobValues) -> dict[str, Value]:
        """Those of ``args`` that the search may change."""
        return {name: args[name] for name in self._landscape.space.by_name if name in args}


def landscape_shape(host: Host) -> ModelShape | None:
    """The model as far as ``host`` tells; None where it does not."""
    if host.weights_gib is None or host.kv_bytes_per_token is None:
        return None
    return model_shape.stated(round(host.weights_gib * GIB), host.kv_bytes_per_token)


def machine_of(host: Host) -> Machine | None:
    """The card as far as ``host`` tells; what it does not say is free, is."""
    if host.gpu_total_gib is None:
        return None
    free = host.gpu_total_gib if host.gpu_free_gib is None else host.gpu_free_gib
    return Machine("cuda", round(host.gpu_total_gib * GIB), round(free * GIB), 1, "landscape")


def simulate(landscape: Landscape, optimizer: str, seed: int, budget: int, *, guarded: bool = True) -> SimulatedRun:
    """A run of ``budget`` trials; what the guard refuses costs none. Raises LandscapeError, ValueError."""
    guard = SimulatedGuard(landscape, enabled=guarded)
    context = Context(
        incumbent=guard.knobs(landscape.incumbent) or None,
        longest_request_tokens=landscape.host.max_len_needed,
        project=guard.project if guarded else None,
        limits=landscape.slo,
    )
    searcher = make(optimizer, landscape.space, seed, budget, context)
    history: list[Observation] = []
    trials: list[SimulatedTrial] = []
    refused = in_a_row = 0
    while len(trials) < budget and in_a_row < MOST_REFUSALS_IN_A_ROW:
        proposal = searcher.ask(history)
        args, refusal, _ = guard.plan(proposal.config)
        if refusal:
            history.append(Observation(dict(proposal.config), ObservedStatus.REFUSED, float("inf"), None))
            refused, in_a_row = refused + 1, in_a_row + 1
            continue
        in_a_row = 0
        verdict = landscape.evaluate(args, np.random.default_rng([seed, _NOISE, len(trials)]))
        value = None if verdict.latency_ms is None else -verdict.latency_ms
        history.append(Observation(guard.knobs(args), verdict.outcome, verdict.violation, value, verdict.margins))
        trials.append(SimulatedTrial(args, verdict, proposal.phase, proposal.reason))
    run = SimulatedRun(landscape.name, optimizer, seed, tuple(trials), refused, None, None)
    return run if run.best is None else replace(run, **_served(landscape, run.best.config, seed))


def _served(landscape: Landscape, config: KnobValues, seed: int) -> dict[str, float | None]:
    """What ``config`` does when it is started again and again, with noise of its own."""
    generators = [np.random.default_rng([seed, _AGAIN, number]) for number in range(_EVALUATIONS_AGAIN)]
    verdicts = [landscape.evaluate(config, rng) for rng in generators]
    latencies = [v.latency_ms for v in verdicts if v.outcome is ObservedStatus.FEASIBLE and v.latency_ms is not None]
    served_ms = float(np.mean(latencies)) if latencies else None
    return {"served_ms": served_ms, "served_feasible": len(latencies) / _EVALUATIONS_AGAIN}
