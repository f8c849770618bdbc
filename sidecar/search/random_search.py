"""Random search: the baseline. It only learns which configurations to avoid."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sidecar.search.contract import Observation, Proposal
from sidecar.search.failed_configs import FailedConfigs
from sidecar.search.space import Space

RANDOM_PHASE = "random"


@dataclass(frozen=True)
class Uniform:
    """The optimizer."""

    space: Space
    seed: int

    def ask(self, history: Sequence[Observation]) -> Proposal:
        """A uniform draw, repeated if that configuration has failed before (only likely in tiny spaces)."""
        rng = np.random.default_rng([self.seed, len(history)])
        failed_configs = FailedConfigs.of(self.space, history)
        config, why = failed_configs.avoiding(lambda: (self.space.sample(rng), "uniform draw"))
        return Proposal(config, RANDOM_PHASE, why)
