"""Where the search looks for its next trial: steps from one place, in one knob and in several."""

import numpy as np

from sidecar.search.encoding import Array, Encoding

_STOPS = 11  # along each number, when it alone is moved
_DRAWS = 200
_SPREADS = (0.05, 0.15, 0.4)  # of a step, in shares of the range
_MOVED = (0.4, 0.8)  # share of the knobs that a step moves; or one or two of them
_FLIPPED = 0.3  # share of the choices that a step reaches and changes


def around(encoding: Encoding, centre: Array, rng: np.random.Generator) -> Array:
    """Places to consider: each knob alone over its range, and random steps. Shape (places, knobs)."""
    return np.concatenate([one_by_one(encoding, centre), _together(encoding, centre, rng)])


def one_by_one(encoding: Encoding, centre: Array) -> Array:
    """Each knob alone over its range, and each of its choices. Shape (places, knobs)."""
    rows: list[Array] = []
    for column, choices in enumerate(encoding.choices):
        for value in range(choices) if choices else np.linspace(0.0, 1.0, _STOPS):
            rows.append(centre.copy())
            rows[-1][column] = value
    return np.array(rows)


def _together(encoding: Encoding, centre: Array, rng: np.random.Generator) -> Array:
    knobs = len(centre)
    places = np.repeat(centre[None], _DRAWS, axis=0)
    moved = rng.random((_DRAWS, knobs)) < rng.choice([1.5 / knobs, *_MOVED], size=(_DRAWS, 1))
    steps = moved * rng.normal(size=(_DRAWS, knobs)) * rng.choice(_SPREADS, size=(_DRAWS, 1))
    numbers = ~encoding.categorical
    places[:, numbers] = np.clip(places[:, numbers] + steps[:, numbers], 0.0, 1.0)
    for column in np.flatnonzero(encoding.categorical):
        flipped = moved[:, column] & (rng.random(_DRAWS) < _FLIPPED)
        places[flipped, column] = rng.integers(encoding.choices[column], size=int(flipped.sum()))
    return places
