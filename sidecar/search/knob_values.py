"""Values of a single knob: sampling, perturbing, clipping to the range."""

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllm_sloguard.knobs import Knob, KnobKind, Value

Array: TypeAlias = NDArray[np.floating[Any]]


def draw(knob: Knob, rng: np.random.Generator) -> Value:
    """A value drawn uniformly, on the knob's scale."""
    if knob.kind is KnobKind.CATEGORICAL:
        return knob.choices[int(rng.integers(len(knob.choices)))]
    return from_unit(knob, float(rng.random()))


def centre(knob: Knob) -> Value:
    """The first choice (vLLM's default in the knob table), or the middle of the range on the knob's scale."""
    return knob.choices[0] if knob.kind is KnobKind.CATEGORICAL else from_unit(knob, 0.5)


def nearest(knob: Knob, value: Value) -> Value:
    """The allowed value closest to ``value``; the centre if the two are not comparable."""
    if knob.holds(value):
        return value
    if isinstance(value, str) or (isinstance(value, float) and math.isnan(value)):
        return centre(knob)
    if knob.kind is KnobKind.CATEGORICAL:
        return _nearest_choice(knob, value)
    if isinstance(value, bool):
        return centre(knob)
    clipped = min(max(value, knob.low), knob.high)
    if knob.kind is KnobKind.FLOAT:
        return float(clipped)
    return min(max(round(clipped), math.ceil(knob.low)), math.floor(knob.high))


def numeric_bounds(knob: Knob) -> tuple[float, float]:
    """The range, widened by half a step for integers so that the end values are drawn as often as the others."""
    margin = 0.5 if knob.kind is KnobKind.INT else 0.0
    return knob.low - margin, knob.high + margin


def _nearest_choice(knob: Knob, value: float) -> Value:
    numbers = [choice for choice in knob.choices if not isinstance(choice, str)]
    if not numbers:
        return centre(knob)
    clipped = min(max(value, min(numbers)), max(numbers))  # a difference to infinity says nothing
    return min(numbers, key=lambda choice: abs(choice - clipped))


def to_unit(knob: Knob, values: Array) -> Array:
    """Position of numeric values in the range, 0 to 1, on the knob's scale. Shape as ``values``."""
    low, high = numeric_bounds(knob)
    if knob.log:
        return np.log(values / low) / math.log(high / low)
    return (values - low) / (high - low)


def from_unit(knob: Knob, share: float) -> Value:
    """The numeric value at ``share`` of the range, 0 to 1, on the knob's scale."""
    low, high = numeric_bounds(knob)
    return tidy(knob, low * (high / low) ** share if knob.log else low + share * (high - low))


def from_unit_array(knob: Knob, shares: Array) -> Array:
    """The same for many positions, not rounded. Shape as ``shares``."""
    low, high = numeric_bounds(knob)
    return low * (high / low) ** shares if knob.log else low + shares * (high - low)


def tidy(knob: Knob, value: float) -> Value:
    """The allowed value closest to ``value``, rounded to four significant digits to keep records readable."""
    return nearest(knob, value if knob.kind is KnobKind.INT else float(f"{value:.4g}"))


def moved(knob: Knob, value: Value, spread: float, rng: np.random.Generator) -> Value:
    """A numeric value perturbed by N(0, ``spread`` of the range), different from ``value`` if possible."""
    if isinstance(value, str):
        raise TypeError(f"{knob.name}: only numeric values can be perturbed, got {value!r}")
    here = float(to_unit(knob, np.array(value, dtype=float)))
    move = float(rng.normal(0.0, spread))
    # At an end of the range half of the steps would leave it, so they are reflected.
    candidates = [from_unit(knob, min(max(here + delta, 0.0), 1.0)) for delta in (move, -move)]
    if knob.kind is KnobKind.INT:
        # A small step rounds to zero; take the next integer instead.
        candidates += [value + 1, value - 1] if move > 0 else [value - 1, value + 1]
    return next((new for new in candidates if new != value and knob.holds(new)), value)
