"""Configurations as vectors, for distance-based models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sidecar.search.knob_values import Array, centre, from_unit, nearest, numeric_bounds, to_unit
from sidecar.search.space import Space
from vllm_sloguard.knobs import Knob, KnobKind, KnobValues, Value

Indices: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Encoding:
    """One column per knob: a number's position in its range, 0 to 1 on its scale, or the index of a choice.

    A knob that is inactive in a configuration is encoded at its centre.
    """

    space: Space

    @cached_property
    def categorical(self) -> NDArray[np.bool_]:
        """Which columns are choices. Shape (knobs,)."""
        return np.array([knob.kind is KnobKind.CATEGORICAL for knob in self.space.knobs])

    @cached_property
    def choices(self) -> Indices:
        """How many choices each column has; 0 for a number. Shape (knobs,)."""
        return np.array([len(knob.choices) for knob in self.space.knobs])

    def encode(self, configs: Sequence[KnobValues]) -> Array:
        """Shape (configs, knobs)."""
        rows = [[self._place(knob, config.get(knob.name)) for knob in self.space.knobs] for config in configs]
        return np.array(rows, dtype=float).reshape(len(configs), len(self.space.knobs))

    @cached_property
    def _places(self) -> dict[tuple[str, type, Value | None], float]:
        """A cache of encodings: every ask brings the full history."""
        return {}

    def _place(self, knob: Knob, value: Value | None) -> float:
        key = knob.name, type(value), value
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = _encoded(knob, value)
        return place

    def decode(self, row: Array) -> dict[str, Value]:
        """The configuration encoded by ``row``."""
        return self.space.active({k.name: _decoded(k, float(row[i])) for i, k in enumerate(self.space.knobs)})

    def differences(self, left: Array, right: Array) -> Array:
        """How far ``left`` exceeds ``right`` in each knob; 1 for another choice. Shape (knobs, left, right)."""
        difference = left.T[:, :, None] - right.T[:, None, :]
        for column in self._choice_columns:
            np.not_equal(difference[column], 0, out=difference[column])
        return difference

    def square_distances(self, left: Array, right: Array, weights: Array) -> Array:
        """Squared distances, each knob's difference multiplied by its weight. Shape (left, right)."""
        one, other = left * weights, right * weights
        choices = self._choice_columns
        one[:, choices], other[:, choices] = 0.0, 0.0
        distances = np.square(one).sum(axis=1)[:, None] + np.square(other).sum(axis=1) - 2.0 * (one @ other.T)
        np.maximum(distances, 0.0, out=distances)
        for column in choices:
            distances += weights[column] ** 2 * (left[:, column, None] != right[:, column])
        return distances

    @cached_property
    def _choice_columns(self) -> list[int]:
        return np.flatnonzero(self.categorical).tolist()

    def closest(self, places: Array, near: Array, most: int) -> Indices:
        """Indices of the ``most`` points closest to ``near``, in their original order."""
        if len(places) <= most:
            return np.arange(len(places))
        distances = np.square(self.differences(places, near[None])[:, :, 0]).sum(axis=0)
        return np.sort(np.argsort(distances, kind="stable")[:most])


def _encoded(knob: Knob, value: Value | None) -> float:
    """The encoding of one value; the centre if it is missing."""
    known = centre(knob) if value is None else nearest(knob, value)
    if knob.kind is KnobKind.CATEGORICAL:
        return float(knob.choices.index(known))
    return float(to_unit(knob, np.array(known, dtype=float)))


def _decoded(knob: Knob, place: float) -> Value:
    if knob.kind is KnobKind.CATEGORICAL:
        return knob.choices[int(place)]
    return from_unit(knob, min(max(place, 0.0), 1.0))


def span(knob: Knob) -> float:
    """The width of a numeric knob's range: in factors of e on a logarithmic scale, else in its own unit."""
    low, high = numeric_bounds(knob)
    return math.log(high / low) if knob.log else high - low
