"""Optuna's Gaussian-process sampler with constraints, rebuilt from the history at each ask.

For comparison only: it needs torch, which the sidecar does not depend on.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, create_trial

from sidecar.search.contract import Observation, Proposal
from sidecar.search.failed_configs import FailedConfigs
from sidecar.search.knob_values import centre, nearest
from sidecar.search.space import Space
from sidecar.search.tpe import OPTUNA_STARTUP_TRIALS, decoded_value, distribution, drawn, random_start, unless_failed
from vllm_sloguard.knobs import KnobValues, Value

GP_PHASE = "gp-exploit"
# A Gaussian process is smooth: the published violation of 100 for a crash would flatten all others.
_CRASH_VIOLATION = 10.0


@dataclass(frozen=True)
class Gp:
    """The optimizer. Until ``startup`` trials ran it draws at random.

    Raises:
        ValueError: torch is not installed.
    """

    space: Space
    seed: int
    startup: int = OPTUNA_STARTUP_TRIALS

    def __post_init__(self) -> None:
        if importlib.util.find_spec("torch") is None:
            raise ValueError("the optimizer gp needs torch, which is not installed; sloguard works without it")

    def ask(self, history: Sequence[Observation]) -> Proposal:
        """The point of highest constrained expected improvement, or a neighbour if that very point has failed."""
        rng = np.random.default_rng([self.seed, len(history)])
        failed_configs = FailedConfigs.of(self.space, history)
        if why := random_start(history, self.startup):
            return drawn(self.space, failed_configs, rng, GP_PHASE, why)
        best = self._best(history, int(rng.integers(2**31)))
        why = f"constrained expected improvement over {len(history)} trials"
        return unless_failed(self.space, failed_configs, rng, Proposal(best, GP_PHASE, why))

    def _best(self, history: Sequence[Observation], seed: int) -> dict[str, Value]:
        """GPSampler's suggestion. Every knob is in every trial, since it supports no conditional ones."""
        distributions = {knob.name: distribution(knob) for knob in self.space.knobs}
        worst = min((o.value for o in history if o.value is not None), default=0.0)
        study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=0)
        )
        study.add_trials(_replayed(self._complete(o.config), o, distributions, worst) for o in history)
        suggested = study.ask(distributions).params
        return self.space.active({name: decoded_value(self.space.by_name[name], suggested[name]) for name in suggested})

    def _complete(self, config: KnobValues) -> KnobValues:
        return {
            knob.name: nearest(knob, config[knob.name]) if knob.name in config else centre(knob)
            for knob in self.space.knobs
        }


def _replayed(
    config: KnobValues, seen: Observation, distributions: dict[str, BaseDistribution], worst: float
) -> FrozenTrial:
    """A finished trial with a single constraint: GPSampler requires the same number in every trial."""
    return create_trial(
        params=dict(config),
        distributions=distributions,
        value=worst if seen.value is None else seen.value,
        constraints={"violation": min(seen.violation, _CRASH_VIOLATION)},
    )
