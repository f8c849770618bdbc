"""How likely a configuration is to crash, from what served and what crashed.

Near what served, or asking for less memory than that, it is safe. A crash is blamed on what the crashed configuration
had and the nearest one that served had not, so it counts against those that have the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sidecar.search.contract import Observation, ObservedStatus
from sidecar.search.encoding import Array, Encoding, span
from vllm_sloguard.knobs import Knob, KnobKind

# How far from what served a step upward leads: a share of 1, or a factor of e. The knobs that take memory.
_UPWARD: Mapping[str, float] = {
    "gpu_memory_utilization": 10.0,
    "kv_cache_memory_bytes": 2.0,
    "max_num_seqs": 0.08,
    "max_num_batched_tokens": 0.12,
    "max_model_len": 0.08,
}
# A small share leaves no cache for one request.
_DOWNWARD: Mapping[str, float] = {"gpu_memory_utilization": 2.0, "kv_cache_memory_bytes": 1.0}
_LITTLE = 0.02
# A choice by name may lack support, by the card or by another choice; switches and sizes rarely do.
_OTHER_NAME, _OTHER_CHOICE = 0.5, 0.1
_OTHER_NUMBER = 0.2
# Memory is a suspect in any crash: a neighbour on the card may have grown.
_ALWAYS_SUSPECT: Mapping[str, float] = {"gpu_memory_utilization": 0.08, "kv_cache_memory_bytes": 0.3}
_REACH = 0.15  # distance at which a vote of what served counts for 1/e
_SIMILAR = 0.2  # lack of likeness at which a vote of what crashed does
_PRIOR_VOTES = 0.3
_MOST_POINTS = 24
# The threshold on the probability to serve, and how it follows the outcomes.
_START, _LOWEST, _HIGHEST, _STEP = 0.5, 0.25, 0.75, 0.05


@dataclass(frozen=True)
class CrashRisk:
    """``served`` and ``crashed`` are encoded places; ``trust`` is the distance at which a crash is as likely as not."""

    encoding: Encoding
    served: Array
    crashed: Array
    trust: float

    @classmethod
    def of(
        cls, encoding: Encoding, tried: Sequence[Observation], places: Array, near: Array, trust: float
    ) -> "CrashRisk":
        """From the trials that ran and their encoded places, as far as these lie close to ``near``."""
        crashes = np.array([o.outcome is ObservedStatus.CRASHED for o in tried], dtype=bool)
        served, crashed = places[~crashes], places[crashes]
        served = served[encoding.closest(served, near, _MOST_POINTS)]
        crashed = crashed[encoding.closest(crashed, near, _MOST_POINTS)]
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
        """How much of what each crash is blamed on is in ``places``: 0 to 1. Shape (places, crashed)."""
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
        """Each crash's blame by knob, which sums to 1, and where the nearest one stood that served."""
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
        """What each knob adds to the distance. Shape as ``differences``: (knobs, places, others)."""
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


def threshold(history: Sequence[Observation]) -> float:
    """How likely to serve a proposal must be: stricter after each crash, laxer after each feasible trial."""
    needed = _START
    for observation in history:
        if observation.outcome is ObservedStatus.CRASHED:
            needed = min(needed + _STEP, _HIGHEST)
        elif observation.outcome is ObservedStatus.FEASIBLE:
            needed = max(needed - _STEP, _LOWEST)
    return needed
