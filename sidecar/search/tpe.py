"""Optuna's tree-structured Parzen estimator (TPE), rebuilt from the history at each ask.

A failure is replayed as arXiv 2604.17627 does it: value -inf, violation 100. Optuna 5 takes both, and ranks an
infeasible trial by its violation alone. Integers are modelled as reals and rounded: Optuna's density of a rounded
normal takes most of an ask's time, and over ranges this wide it is the same density.
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
from sidecar.search.failed_configs import Failures, failed, trials_run
from sidecar.search.knob_values import numeric_bounds, tidy
from sidecar.search.paper_constants import PUBLISHED
from sidecar.search.space import Space
from vllm_sloguard.knobs import Knob, KnobKind, KnobValues, Value

TPE_PHASE = "tpe-exploit"
OPTUNA_STARTUP_TRIALS = 10  # Optuna's own default

# Each ask makes a study, and a line about each would drown the log. Optuna's other loggers keep their level.
logging.getLogger("optuna.storages._in_memory").setLevel(logging.WARNING)


class _Shared:
    """One object for all trials: Optuna copies and compares every trial's, which takes longer than the model itself."""

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
    """TPE that is told which knobs it models jointly (none: each by itself), instead of looking for those that all
    trials share."""

    def __init__(self, joint: dict[str, BaseDistribution], seed: int) -> None:
        super().__init__(n_startup_trials=0, multivariate=bool(joint), constant_liar=False, seed=seed)
        self._joint = joint

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._joint


@dataclass(frozen=True)
class Tpe:
    """The optimizer. Until ``startup`` trials ran it draws at random; 0 is for a history that another one began.

    ``joint`` models the knobs jointly, as Optuna 5 does by default; the study's Optuna took each by itself.
    """

    space: Space
    seed: int
    startup: int = OPTUNA_STARTUP_TRIALS
    joint: bool = True

    def ask(self, history: Sequence[Observation]) -> Proposal:
        """The point of the highest expected improvement, or a neighbour of it where that very point has failed."""
        rng = np.random.default_rng([self.seed, len(history)])
        failures = Failures.of(self.space, history)
        if why := random_start(history, self.startup):
            return drawn(self.space, failures, rng, TPE_PHASE, why)
        best = self._best(history, int(rng.integers(2**31)))
        return unless_failed(
            self.space, failures, rng, Proposal(best, TPE_PHASE, f"expected improvement over {len(history)} trials")
        )

    def _best(self, history: Sequence[Observation], seed: int) -> dict[str, Value]:
        """What TPE proposes. Knobs that always matter may be modelled jointly, the others one by one."""
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
    """Why to draw at random, empty where the model has something to go by.

    Where all failed a model would take the least bad failure for a good point and stay near it.
    """
    if trials_run(history) < startup:
        return f"random start, {trials_run(history) + 1} of {startup}"
    return "random, nothing has served yet" if all(failed(observation) for observation in history) else ""


def drawn(space: Space, failures: Failures, rng: np.random.Generator, phase: str, why: str) -> Proposal:
    """A random configuration that has not failed."""
    config, why = failures.avoiding(lambda: (space.sample(rng), why))
    return Proposal(config, phase, why)


def unless_failed(space: Space, failures: Failures, rng: np.random.Generator, best: Proposal) -> Proposal:
    """``best``, or a neighbour of it where that very point has failed."""
    if best.config not in failures:
        return best
    spread = PUBLISHED.step * PUBLISHED.temperature_start
    config, changed = failures.avoiding(
        lambda: space.neighbour(best.config, rng, PUBLISHED.structural_start, spread),
    )
    return Proposal(config, best.phase, f"changed {changed or 'nothing'}, the point of expected improvement has failed")


def distribution(knob: Knob) -> BaseDistribution:
    """The knob's range, as Optuna has it."""
    if knob.kind is KnobKind.CATEGORICAL:
        return _SharedCategorical(knob.choices)
    return _SharedFloat(*numeric_bounds(knob), log=knob.log)


def decoded_value(knob: Knob, suggested: Value) -> Value:
    """The knob's value that Optuna means."""
    if knob.kind is KnobKind.CATEGORICAL or isinstance(suggested, str):
        return suggested
    return tidy(knob, suggested)


def _replayed(config: KnobValues, seen: Observation, distributions: dict[str, BaseDistribution]) -> FrozenTrial:
    """A finished trial. Each has its constraint: Optuna takes one without for feasible."""
    return create_trial(
        params=dict(config),
        distributions={name: distributions[name] for name in config},
        value=seen.value if seen.outcome is ObservedStatus.FEASIBLE else -math.inf,
        constraints={"violation": min(seen.violation, PUBLISHED.crash_violation)},
    )
