"""Candidate generation: one-knob and multi-knob steps from a given configuration."""

from collections.abc import Sequence

import numpy as np

from sidecar.search.encoding import Array, Encoding
from sidecar.search.knob_values import from_unit_array, to_unit
from vllm_sloguard.knobs import KnobKind

_SEQUENCES, _BATCH = "max_num_seqs", "max_num_batched_tokens"
_STOPS = 11  # grid points per numeric knob in one-knob steps
_DRAWS = 400
_SPREADS = (0.05, 0.15, 0.4)  # step standard deviations, as a share of the range
_MOVED = (0.4, 0.8)  # share of the knobs that a random step moves; otherwise one or two knobs
_FLIPPED = 0.3  # probability that a step changes a categorical knob it may move


def around(encoding: Encoding, centre: Array, rng: np.random.Generator) -> Array:
    """Candidate points: one-knob sweeps over each range, plus random steps. Shape (places, knobs)."""
    return reconciled(encoding, np.concatenate([_one_by_one(encoding, centre), _together(encoding, centre, rng)]))


def reconciled(encoding: Encoding, places: Array) -> Array:
    """``places`` with max_num_seqs capped at max_num_batched_tokens; vLLM refuses anything above.

    Repair would raise the batch instead, so a search centred on many sequences could never try a small batch.
    """
    knobs = {knob.name: column for column, knob in enumerate(encoding.space.knobs)}
    if not {_SEQUENCES, _BATCH} <= knobs.keys():
        return places
    seqs, batch = (encoding.space.by_name[name] for name in (_SEQUENCES, _BATCH))
    if KnobKind.CATEGORICAL in (seqs.kind, batch.kind):
        return places
    column = knobs[_SEQUENCES]
    tokens = from_unit_array(batch, places[:, knobs[_BATCH]])
    most = np.clip(to_unit(seqs, np.clip(np.floor(tokens), seqs.low, seqs.high)), 0.0, 1.0)
    changed = places.copy()
    changed[:, column] = np.minimum(places[:, column], most)
    return changed


def by_choice(encoding: Encoding, centre: Array) -> Array:
    """Each choice of each categorical knob, one at a time. Shape (places, knobs)."""
    return _alone(centre, [(column, value) for column, n in enumerate(encoding.choices) for value in range(n)])


def _one_by_one(encoding: Encoding, centre: Array) -> Array:
    stops = np.linspace(0.0, 1.0, _STOPS)
    values = [range(choices) if choices else stops for choices in encoding.choices]
    return _alone(centre, [(column, value) for column, row in enumerate(values) for value in row])


def _alone(centre: Array, changes: Sequence[tuple[int, float]]) -> Array:
    """``centre`` with each change (a column and its value) applied. Shape (changes, knobs)."""
    places = np.repeat(centre[None], len(changes), axis=0)
    for row, (column, value) in enumerate(changes):
        places[row, column] = value
    return places


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
