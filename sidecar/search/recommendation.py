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
from sidecar.search.crash_risk import CrashRisk, log_runs_again
from sidecar.search.encoding import Array, Encoding
from sidecar.search.space import Space
from sidecar.search.surrogate import Surrogate, learn

# Required of the configuration that other loads are compared with.
_WORTH_BEATING = 0.75
_TRUST = 1.0
# A failed validation costs the whole gain and its restarts: 1% of doubt counts as much as 1.5% of the objective.
_DOUBT_WEIGHT = 1.5


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
    space: Space, history: Sequence[Observation], *, among: Sequence[int] | None = None, stopped: bool = False
) -> Recommendation | None:
    """The configuration to validate, among ``among`` or all observations; None if no complete load met the SLO.

    With ``stopped``, loads that were stopped early but were going to meet the SLO are considered as well.
    """
    kept = [n for n, o in enumerate(history) if o.outcome is not ObservedStatus.REFUSED]
    tried = [history[n] for n in kept]
    allowed = [row for row, n in enumerate(kept) if among is None or n in among]
    rows = [row for row in allowed if is_candidate(tried[row]) or (stopped and _unconfirmed(tried, row))]
    if not rows:
        return None
    encoding = Encoding(space)
    places = encoding.encode([o.config for o in tried])
    best = max(rows, key=lambda row: tried[row].value or -math.inf)
    risk = CrashRisk.of(encoding, tried, places, places[best], _TRUST)
    model = learn(encoding, tried, places, places[best], risk=risk, priors=True)
    chosen, probability = choose(model, places, rows, log_runs_again(encoding, tried, places))
    return Recommendation(kept[chosen], probability)


def luckiest(_space: Space, history: Sequence[Observation]) -> Recommendation | None:
    """The best single measurement: the earlier rule, kept for comparison."""
    rows = [n for n, o in enumerate(history) if is_candidate(o)]
    best = max(rows, key=lambda n: history[n].value or -math.inf, default=None)
    return None if best is None else Recommendation(best, 1.0)


def is_candidate(seen: Observation) -> bool:
    """Whether it can be recommended: a complete load of this run that met the SLO."""
    return seen.outcome is ObservedStatus.FEASIBLE and seen.complete and not seen.prior


def _going_to_meet(seen: Observation) -> bool:
    return seen.outcome is ObservedStatus.FEASIBLE and not seen.prior


def _unconfirmed(tried: Sequence[Observation], row: int) -> bool:
    """Whether a load was going to meet the SLO when it was stopped, and no complete or failed one followed."""
    seen = tried[row]
    later = (o for o in tried[row + 1 :] if o.config == seen.config)
    return _going_to_meet(seen) and not any(o.complete or o.outcome is not ObservedStatus.FEASIBLE for o in later)


def raised_bar(history: Sequence[Observation], best: int) -> tuple[float, float]:
    """By how much stopped loads were estimated to be better than observation ``best``: log ratio of their lowest mean
    latency to its own, 0 if none was, and its standard deviation."""
    value = history[best].value
    stopped = [o for o in history if _going_to_meet(o) and not o.complete and o.value is not None]
    top = max(stopped, key=lambda o: o.value or -math.inf, default=None)
    if value is None or top is None or top.value is None or not value < top.value < 0:
        return 0.0, 0.0
    return math.log(top.value / value), top.value_sd


def may_repeat(ran: int, budget: int) -> bool:
    """Whether, after ``ran`` trials and one more, enough are left to measure a promising configuration again."""
    return ran + 1 < budget - max(2, budget // 5)


def choose(model: Surrogate, places: Array, rows: Sequence[int], log_runs: Array) -> tuple[int, float]:
    """The row of ``places`` to choose, and its probability of meeting the SLO again.

    ``log_runs`` is that of not running out of memory, for all places.
    """
    here = places[list(rows)]
    log_chance = model.log_meets_again(here) + model.log_serves(here) + log_runs[list(rows)]
    losses = model.loss.predict(here).mean if model.loss is not None else np.zeros(len(here))
    index = int(np.argmax(_DOUBT_WEIGHT * log_chance - losses))
    return rows[index], math.exp(float(log_chance[index]))
