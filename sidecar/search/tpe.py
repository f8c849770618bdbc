"""Optuna's tree-structured Parzen estimator (TPE), rebuilt from the history at each ask.

Failures are replayed as in arXiv 2604.17627: value -inf, violation 100. Optuna 5 accepts both, and ranks an infeasible
trial by its violation alone. Integers are modelled as reals and rounded: Optuna's density for rounded normals takes
most of an ask's time, and over ranges this wide the density is the same.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, create_trial

from sidecar.search.contract import Observation, ObservedStatus, Proposal
from sidecar.search.failed_configs import FailedConfigs, failed, trials_run
from sidecar.search.knob_values import numeric_bounds, tidy
from sidecar.search.paper_constants import PUBLISHED
from sidecar.search.space import Space
from vllm_sloguard.knobs import Knob, KnobKind, KnobValues, Value

TPE_PHASE = "tpe-exploit"
OPTUNA_STARTUP_TRIALS = 10  # Optuna's own default

# Each ask creates a study, and Optuna logs each creation. Its other loggers keep their level.
logging.getLogger("optuna.storages._in_memory").setLevel(logging.WARNING)


class _Shared:
    """One object shared by all trials: Optuna copies and compares each trial's, which takes longer than the model."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class _SharedFloat(_Shared, FloatDistribution):
    pass


class _SharedCategorical(_Shared, CategoricalDistribution):
    pass


class _Sampler(optuna.samplers.TPESampler):
    """TPE with an explicit set of jointly modelled knobs (none: each independently), instead of searching for those
    that all trials share."""

    def __init__(self, joint: dict[str, BaseDistribution], seed: int) -> None:
        super().__init__(n_startup_trials=0, multivariate=bool(joint), constant_liar=False, seed=seed)
        self._joint = joint

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._joint


@dataclass(frozen=True)
class Tpe:
    """The optimizer. The first ``startup`` trials are random; 0 continues a history that another optimizer began.

    ``joint`` models the knobs jointly, as Optuna 5 does by default; the study's Optuna modelled each independently.
    """

    space: Space
    seed: int
    startup: int = OPTUNA_STARTUP_TRIALS
    joint: bool = True

    def ask(self, history: Sequence[Observation]) -> Proposal:
        """The point of highest expected improvement, or a neighbour if that very point has failed."""
        rng = np.random.default_rng([self.seed, len(history)])
        failed_configs = FailedConfigs.of(self.space, history)
        if why := random_start(history, self.startup):
            return drawn(self.space, failed_configs, rng, TPE_PHASE, why)
        best = self._best(history, int(rng.integers(2**31)))
        return unless_failed(
            self.space,
            failed_configs,
            rng,
            Proposal(best, TPE_PHASE, f"expected improvement over {len(history)} trials"),
        )

    def _best(self, history: Sequence[Observation], seed: int) -> dict[str, Value]:
        """TPE's suggestion. Knobs that are always active may be modelled jointly, the others independently."""
        distributions = {knob.name: distribution(knob) for knob in self.space.knobs}
        joint = {
            name: distribution
            for name, distribution in sorted(distributions.items())
            if self.joint and self.space.matters(self.space.by_name[name], {}) and not distribution.single()
        }
        study = optuna.create_study(direction="maximize", sampler=_Sampler(joint, seed))
        study.add_trials(_replayed(self.space.project(o.config), o, distributions) for o in history)
        suggested = study.ask(distributions).params
        return self.space.active({name: decoded_value(self.space.by_name[name], suggested[name]) for name in suggested})


def random_start(history: Sequence[Observation], startup: int) -> str:
    """Why to draw at random; empty if the model has something to learn from.

    If every trial failed, the model would mistake the least bad failure for a good point and stay near it.
    """
    if trials_run(history) < startup:
        return f"random start, {trials_run(history) + 1} of {startup}"
    return "random, no trial has run yet" if all(failed(observation) for observation in history) else ""


def drawn(space: Space, failed_configs: FailedConfigs, rng: np.random.Generator, phase: str, why: str) -> Proposal:
    """A random configuration that has not failed."""
    config, why = failed_configs.avoiding(lambda: (space.sample(rng), why))
    return Proposal(config, phase, why)


def unless_failed(space: Space, failed_configs: FailedConfigs, rng: np.random.Generator, best: Proposal) -> Proposal:
    """``best``, or a neighbour if that very point has failed."""
    if best.config not in failed_configs:
        return best
    spread = PUBLISHED.step * PUBLISHED.temperature_start
    config, changed = failed_configs.avoiding(
        lambda: space.neighbour(best.config, rng, PUBLISHED.structural_start, spread),
    )
    return Proposal(config, best.phase, f"changed {changed or 'nothing'}, the point of expected improvement has failed")


def distribution(knob: Knob) -> BaseDistribution:
    """The knob's range as an Optuna distribution."""
    if knob.kind is KnobKind.CATEGORICAL:
        return _SharedCategorical(knob.choices)
    return _SharedFloat(*numeric_bounds(knob), log=knob.log)


def decoded_value(knob: Knob, suggested: Value) -> Value:
    """The knob's value for Optuna's parameter value."""
    if knob.kind is KnobKind.CATEGORICAL or isinstance(suggested, str):
        return suggested
    return tidy(knob, suggested)


def _replayed(config: KnobValues, seen: Observation, distributions: dict[str, BaseDistribution]) -> FrozenTrial:
    """A finished trial. Each carries its constraint, because Optuna treats a trial without one as feasible."""
    return create_trial(
        params=dict(config),
        distributions={name: distributions[name] for name in config},
        value=seen.value if seen.outcome is ObservedStatus.FEASIBLE else -math.inf,
        constraints={"violation": min(seen.violation, PUBLISHED.crash_violation)},
    )
