"""Crash probability of a configuration, learned from the trials that ran and those that crashed.

A configuration close to one that ran, or asking for less memory, is considered safe. A crash is attributed to the knobs
in which the crashed configuration differs from its nearest neighbour that ran, and counts against others sharing them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sidecar.search.contract import Observation, ObservedStatus
from sidecar.search.encoding import Array, Encoding, span
from vllm_sloguard.knobs import Knob, KnobKind

# Distance of an upward step, for a share of 1 or a factor of e. These knobs take memory.
_UPWARD: Mapping[str, float] = {
    "gpu_memory_utilization": 10.0,
    "kv_cache_memory_bytes": 2.0,
    "max_num_seqs": 0.08,
    "max_num_batched_tokens": 0.12,
    "max_model_len": 0.08,
}
# A very small share leaves no cache for even one request.
_DOWNWARD: Mapping[str, float] = {"gpu_memory_utilization": 2.0, "kv_cache_memory_bytes": 1.0}
_LITTLE = 0.02
# A named choice may be unsupported by the card or by another choice; switches and sizes rarely are.
_OTHER_NAME, _OTHER_CHOICE = 0.5, 0.1
_OTHER_NUMBER = 0.2
# Memory is a suspect in any crash: a neighbour on the card may have grown.
_ALWAYS_SUSPECT: Mapping[str, float] = {"gpu_memory_utilization": 0.08, "kv_cache_memory_bytes": 0.3}
_REACH = 0.15  # distance at which the vote of a trial that ran decays to 1/e
_SIMILAR = 0.2  # dissimilarity at which the vote of a crash decays to 1/e
_PRIOR_VOTES = 0.3
_MAX_POINTS = 24
_ONE_RUN, _SAME = 0.3, 1e-6  # see log_runs_again
# Threshold on the probability of not crashing, and its adaptation to outcomes.
_START, _LOWEST, _HIGHEST, _STEP = 0.5, 0.25, 0.75, 0.05


@dataclass(frozen=True)
class CrashRisk:
    """``served`` and ``crashed`` are encoded points; ``trust`` is the distance at which a crash is 50% likely."""

    encoding: Encoding
    served: Array
    crashed: Array
    trust: float

    @classmethod
    def of(
        cls, encoding: Encoding, tried: Sequence[Observation], places: Array, near: Array, trust: float
    ) -> "CrashRisk":
        """Learned from the trials that ran and their encoded points, limited to those close to ``near``."""
        crashes = np.array([o.outcome is ObservedStatus.CRASHED for o in tried], dtype=bool)
        served, crashed = places[~crashes], places[crashes]
        served = served[encoding.closest(served, near, _MAX_POINTS)]
        crashed = crashed[encoding.closest(crashed, near, _MAX_POINTS)]
        return cls(encoding, served, crashed, trust)

    def probability(self, places: Array) -> Array:
        """Shape (places,)."""
        distances = self._steps(self.encoding.differences(places, self.served)).sum(axis=0)
        served = np.exp(-distances / _REACH).sum(axis=1)
        crashed = np.exp(-(1 - self._likeness(places)) / _SIMILAR).sum(axis=1)
        nearest = distances.min(axis=1, initial=2 * self.trust)
        prior = nearest / (nearest + self.trust)
        return (crashed + _PRIOR_VOTES * prior) / (crashed + served + _PRIOR_VOTES)

    def _likeness(self, places: Array) -> Array:
        """How far ``places`` share the causes attributed to each crash, 0 to 1. Shape (places, crashed)."""
        blame, origins = self._blame
        likeness = np.zeros((len(places), len(self.crashed)))
        for column, categorical in enumerate(self.encoding.categorical):
            for number, crash in enumerate(self.crashed):
                if categorical:
                    same = (places[:, column] == crash[column]).astype(float)
                else:
                    way = crash[column] - origins[number, column]
                    gone = (places[:, column] - origins[number, column]) / way if way else np.ones(len(places))
                    same = np.clip(gone, 0.0, 1.0)
                likeness[:, number] += blame[number, column] * same
        return likeness

    @cached_property
    def _blame(self) -> tuple[Array, Array]:
        """Each crash's attribution over the knobs, summing to 1, and its nearest neighbour that ran."""
        blame, origins = np.zeros_like(self.crashed), np.zeros_like(self.crashed)
        for number, crash in enumerate(self.crashed):
            if len(self.served):
                steps = self._steps(self.encoding.differences(crash[None], self.served))[:, 0]
                index = int(np.argmin(steps.sum(axis=0)))
                blame[number], origins[number] = steps[:, index], self.served[index]
            else:
                blame[number], origins[number] = 1.0, 0.0
            for column, knob in enumerate(self.encoding.space.knobs):
                suspect = _ALWAYS_SUSPECT.get(knob.name)
                if suspect and crash[column] - origins[number, column] < suspect / span(knob):
                    origins[number, column] = crash[column] - suspect / span(knob)
                    cleared = 1 + (self.served[:, column] >= crash[column]).sum()
                    blame[number, column] += suspect * _UPWARD[knob.name] / cleared
        return blame / np.maximum(blame.sum(axis=1, keepdims=True), 1e-9), origins

    def _steps(self, differences: Array) -> Array:
        """Each knob's contribution to the distance. Shape as ``differences``: (knobs, places, others)."""
        up, down = self._weights
        return up[:, None, None] * np.maximum(differences, 0) + down[:, None, None] * np.maximum(-differences, 0)

    @cached_property
    def _weights(self) -> tuple[Array, Array]:
        up, down = np.array([_weights(knob) for knob in self.encoding.space.knobs]).T
        return up, down


def _weights(knob: Knob) -> tuple[float, float]:
    if knob.kind is KnobKind.CATEGORICAL:
        weight = _OTHER_NAME if any(isinstance(choice, str) for choice in knob.choices) else _OTHER_CHOICE
        return weight, weight
    if knob.name in _UPWARD:
        return _UPWARD[knob.name] * span(knob), _DOWNWARD.get(knob.name, _LITTLE) * span(knob)
    return _OTHER_NUMBER, _OTHER_NUMBER


def log_runs_again(encoding: Encoding, tried: Sequence[Observation], places: Array) -> Array:
    """Log probability that a configuration that ran with the memory it asks for runs again. Shape (trials,).

    More memory than the first trial's, the incumbent's, may be there only at times: that one or two runs with at least
    as much did not crash proves little (Laplace's rule of succession, weakened by a prior).
    """
    ran = np.array([o.outcome is not ObservedStatus.CRASHED for o in tried], dtype=bool)
    doubt = np.zeros(len(places))
    for column, knob in enumerate(encoding.space.knobs):
        if knob.name not in _ALWAYS_SUSPECT or encoding.categorical[column]:
            continue
        asked = places[:, column]
        runs = ((asked[None, :] >= asked[:, None] - _SAME) & ran).sum(axis=1)
        doubt = np.maximum(doubt, np.where(asked > asked[0] + _SAME, _ONE_RUN / (runs + 1), 0.0))
    return np.log1p(-doubt)


def threshold(history: Sequence[Observation]) -> float:
    """Required probability of not crashing: stricter after each crash, laxer after each feasible trial."""
    needed = _START
    for observation in history:
        if observation.outcome is ObservedStatus.CRASHED:
            needed = min(needed + _STEP, _HIGHEST)
        elif observation.outcome is ObservedStatus.FEASIBLE:
            needed = max(needed - _STEP, _LOWEST)
    return needed
