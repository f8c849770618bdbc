"""Thermal Budget Annealing: simulated annealing that first looks for feasibility (arXiv 2604.17627).

It lowers the SLO violation until a configuration is feasible, then raises the objective among feasible ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sidecar.search.contract import Observation, ObservedStatus, Proposal
from sidecar.search.failed_configs import Blacklist, FailedConfigs
from sidecar.search.paper_constants import PUBLISHED
from sidecar.search.space import Space
from vllm_sloguard.knobs import KnobValues, Value

TBA_PHASE = "tba-explore"


@dataclass(frozen=True)
class AnnealingState:
    """The state of the annealing.

    ``energy`` is that of ``current`` and is minimised: the violation until something is feasible, the negated objective
    after. ``spread`` is the range of the objective among feasible trials, ``stalled`` the number of trials since the
    last improvement or reheat.
    """

    temperature: float = PUBLISHED.temperature_start
    current: KnobValues | None = None
    energy: float = math.inf
    best: float = math.inf
    worst_feasible: float = -math.inf
    feasible: bool = False
    trials: int = 0
    stalled: int = 0
    reheats: int = 0

    @property
    def scale(self) -> float:
        """The scale of energy differences."""
        return self.worst_feasible - self.best if self.feasible else PUBLISHED.violation_scale


def fold(history: Sequence[Observation], seed: int) -> AnnealingState:
    """The state after replaying ``history``."""
    state = AnnealingState()
    for index, observation in enumerate(history):
        state = advanced(state, observation, np.random.default_rng([seed, index, 1]))
    return state


def advanced(state: AnnealingState, seen: Observation, rng: np.random.Generator) -> AnnealingState:
    """The state after one more observation. A refused configuration never ran, so it changes nothing."""
    if seen.outcome is ObservedStatus.REFUSED:
        return state
    energy = _energy(seen, state.feasible)
    if seen.outcome is ObservedStatus.FEASIBLE and not state.feasible:
        return AnnealingState(
            temperature=PUBLISHED.first_feasible * PUBLISHED.temperature_start,
            current=seen.config,
            energy=energy,
            best=energy,
            worst_feasible=energy,
            feasible=True,
            trials=state.trials + 1,
            reheats=state.reheats,
        )
    improved = energy < state.best
    after = replace(state, best=min(state.best, energy), trials=state.trials + 1)
    if seen.outcome is ObservedStatus.FEASIBLE:
        after = replace(after, worst_feasible=max(state.worst_feasible, energy))
    starting = state.trials < PUBLISHED.initial_trials
    if state.current is None or (improved if starting else accepts(energy - state.energy, after, rng)):
        after = replace(after, current=seen.config, energy=energy)
    return after if starting else _tempered(after, improved)


def accepts(rise: float, state: AnnealingState, rng: np.random.Generator) -> bool:
    """The Metropolis rule: accept any decrease, and an increase with probability exp(-rise / (temperature * scale))."""
    if rise <= 0:
        return True
    return math.isfinite(rise) and float(rng.random()) < math.exp(-rise / state.scale / state.temperature)


def _tempered(state: AnnealingState, improved: bool) -> AnnealingState:
    """Cools after an improvement, reheats after too many trials without one. The initial trials do neither."""
    if improved:
        factor = PUBLISHED.cooling if state.feasible else PUBLISHED.cooling_infeasible
        return replace(state, temperature=max(state.temperature * factor, PUBLISHED.temperature_floor), stalled=0)
    if state.stalled + 1 < PUBLISHED.patience_trials:
        return replace(state, stalled=state.stalled + 1)
    cap = PUBLISHED.reheat_cap * PUBLISHED.temperature_start
    # A temperature already above the cap stays as it is: a reheat must not cool.
    hotter = max(min(state.temperature * PUBLISHED.reheat, cap), state.temperature)
    return replace(state, temperature=hotter, stalled=0, reheats=state.reheats + 1)


def _energy(seen: Observation, feasible_known: bool) -> float:
    """Once something is feasible, only feasible configurations have a finite energy."""
    if seen.outcome is ObservedStatus.FEASIBLE and seen.value is not None:
        return -seen.value
    return math.inf if feasible_known else min(seen.violation, PUBLISHED.crash_violation)


@dataclass(frozen=True)
class Annealing:
    """The optimizer. ``trials`` is the length of this phase, over which structural changes become rarer."""

    space: Space
    seed: int
    trials: int

    def ask(self, history: Sequence[Observation]) -> Proposal:
        """Random initial trials, the incumbent included, then neighbours of the current state."""
        rng = np.random.default_rng([self.seed, len(history)])
        state = fold(history, self.seed)
        failed_configs = FailedConfigs.of(self.space, history)
        if state.current is None or state.trials < PUBLISHED.initial_trials:
            why = f"random start, {state.trials + 1} of {PUBLISHED.initial_trials}"
            config, why = failed_configs.avoiding(lambda: (self.space.sample(rng), why))
            return Proposal(config, TBA_PHASE, why)
        current, blacklist = state.current, Blacklist.of(self.space, history)
        structural, spread = self.structural(state.trials), PUBLISHED.step * state.temperature

        def neighbour() -> tuple[dict[str, Value], str]:
            return self.space.neighbour(current, rng, structural, spread, blacklist.permits)

        config, changed = failed_configs.avoiding(neighbour)
        if config not in failed_configs:
            return Proposal(config, TBA_PHASE, f"T={state.temperature:.2f}, changed {changed or 'nothing'}")
        why = f"T={state.temperature:.2f}, random, since all neighbours have failed"
        config, why = failed_configs.avoiding(lambda: (self.space.sample(rng), why))
        return Proposal(config, TBA_PHASE, why)

    def structural(self, trials: int) -> float:
        """The probability of a structural change after ``trials``, decreasing linearly."""
        progress = min(trials / self.trials, 1.0)
        return PUBLISHED.structural_start + progress * (PUBLISHED.structural_end - PUBLISHED.structural_start)
