"""Chooses the candidate to validate: the best configuration that the models expect to meet the SLO again. Pure.

The best of many noisy trials tends to be a lucky one at the edge of a limit. So the choice does not rest on the
measured value: the models smooth over neighbours and repeats, run-to-run spread enters the probability, and doubt is
traded off against the objective.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sidecar.search.contract import Observation, ObservedStatus
from sidecar.search.crash_risk import CrashRisk
from sidecar.search.encoding import Array, Encoding
from sidecar.search.space import Space
from sidecar.search.surrogate import Surrogate, learn

# Required of the configuration that other loads are compared with.
_WORTH_BEATING = 0.75
_TRUST = 1.0


@dataclass(frozen=True)
class Recommendation:
    """The observation at ``index`` of the history; its configuration meets the SLO again with ``probability``."""

    index: int
    probability: float

    @property
    def worth_beating(self) -> bool:
        """Whether it is safe to stop a load that is slower than this one."""
        return self.probability >= _WORTH_BEATING


def recommended(
    space: Space, history: Sequence[Observation], *, among: Sequence[int] | None = None
) -> Recommendation | None:
    """The configuration to validate, among ``among`` or all observations; None if no complete load met the SLO."""
    kept = [n for n, o in enumerate(history) if o.outcome is not ObservedStatus.REFUSED]
    tried = [history[n] for n in kept]
    rows = [row for row, o in enumerate(tried) if is_candidate(o) and (among is None or kept[row] in among)]
    if not rows:
        return None
    encoding = Encoding(space)
    places = encoding.encode([o.config for o in tried])
    best = max(rows, key=lambda row: tried[row].value or -math.inf)
    risk = CrashRisk.of(encoding, tried, places, places[best], _TRUST)
    model = learn(encoding, tried, places, places[best], risk=risk, priors=True)
    chosen, probability = choose(model, places, rows)
    return Recommendation(kept[chosen], probability)


def luckiest(_space: Space, history: Sequence[Observation]) -> Recommendation | None:
    """The best single measurement: the earlier rule, kept for comparison."""
    rows = [n for n, o in enumerate(history) if is_candidate(o)]
    best = max(rows, key=lambda n: history[n].value or -math.inf, default=None)
    return None if best is None else Recommendation(best, 1.0)


def is_candidate(seen: Observation) -> bool:
    """Whether it can be recommended: a complete load of this run that met the SLO."""
    return seen.outcome is ObservedStatus.FEASIBLE and seen.complete and not seen.prior


def choose(model: Surrogate, places: Array, rows: Sequence[int]) -> tuple[int, float]:
    """The row of ``places`` to choose, and its probability of meeting the SLO again."""
    here = places[list(rows)]
    log_chance = model.log_meets_again(here) + model.log_serves(here)
    losses = model.loss.predict(here).mean if model.loss is not None else np.zeros(len(here))
    # A failed validation costs the whole gain, so 1% of doubt is worth 1% of the objective.
    index = int(np.argmax(log_chance - losses))
    return rows[index], math.exp(float(log_chance[index]))
