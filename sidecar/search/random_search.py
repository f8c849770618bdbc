"""Random search: the baseline. It learns nothing but what to leave out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sidecar.search.contract import Observation, Proposal
from sidecar.search.failed_configs import Failures
from sidecar.search.space import Space

RANDOM_PHASE = "random"


@dataclass(frozen=True)
class Uniform:
    """The optimizer."""

    space: Space
    seed: int

    def ask(self, history: Sequence[Observation]) -> Proposal:
        """A uniform draw. One that has failed before is drawn again, which only spaces of few points notice."""
        rng = np.random.default_rng([self.seed, len(history)])
        failures = Failures.of(self.space, history)
        config, why = failures.avoiding(lambda: (self.space.sample(rng), "uniform draw"))
        return Proposal(config, RANDOM_PHASE, why)
