"""The space: sampling, perturbing, projecting."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import ONE_CHOICE, ONE_INT, SPACE, SPACES

from sidecar.search.knob_values import draw, from_unit, moved, nearest, to_unit
from sidecar.search.space import Space
from vllm_sloguard.knobs import KNOBS, Knob, KnobKind, KnobValues, Value

SEQS = SPACE.by_name["max_num_seqs"]
MEMORY = SPACE.by_name["gpu_memory_utilization"]
BLOCK = SPACE.by_name["block_size"]
INSIDE: KnobValues = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "gpu_memory_utilization": 0.9,
    "enforce_eager": True,
    "block_size": 32,
}


@given(seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_samples_and_their_neighbours_lie_inside(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for space in (*SPACES.values(), Space(tuple(KNOBS.values()))):
        config = space.sample(rng)
        assert space.contains(config)
        assert space.project(config) == config
        near, changed = space.neighbour(config, rng, structural=0.5, spread=0.3)
        assert space.contains(near)
        assert (changed == "") == (space is ONE_CHOICE)


def test_a_projection_clips_fills_and_drops() -> None:
    incumbent: KnobValues = {"max_num_seqs": 1024, "gpu_memory_utilization": 0.5, "block_size": 128, "dtype": "half"}
    assert SPACE.project(incumbent) == {
        "enable_chunked_prefill": True,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 2047,
        "gpu_memory_utilization": 0.6,
        "enforce_eager": False,
        "block_size": 64,
    }


@pytest.mark.parametrize(
    ("knob", "value", "expected"),
    [
        (SEQS, 17.6, 18),
        (SEQS, -5, 4),
        (SEQS, 10**400, 128),
        (SEQS, math.inf, 128),
        (SEQS, math.nan, 21),
        (SEQS, "auto", 21),
        (SEQS, True, 21),
        (MEMORY, 2, 0.95),
        (BLOCK, 40, 32),
        (BLOCK, 10**400, 64),
        (BLOCK, -math.inf, 16),
        (BLOCK, "auto", 16),
        (KNOBS["kv_cache_dtype"], 8, "auto"),
        (KNOBS["enforce_eager"], 1, True),
    ],
)
def test_a_value_comes_to_the_nearest_one(knob: Knob, value: Value, expected: Value) -> None:
    result = nearest(knob, value)
    assert result == expected
    assert type(result) is type(expected)


def test_a_knob_without_its_requirement_is_left_out() -> None:
    assert SPACE.contains(INSIDE)
    assert not SPACE.contains({**INSIDE, "enable_chunked_prefill": True})
    assert not SPACE.contains({**INSIDE, "enforce_eager": False})
    assert SPACE.active({**INSIDE, "enable_chunked_prefill": True, "dtype": "half"}) == INSIDE


def test_requirements_chain_and_those_outside_the_space_hold() -> None:
    switch = (False, True)
    space = Space(
        (
            Knob("c", KnobKind.CATEGORICAL, choices=switch, requires={"b": True}),
            Knob("b", KnobKind.CATEGORICAL, choices=switch, requires={"a": True}),
            Knob("a", KnobKind.CATEGORICAL, choices=switch, requires={"elsewhere": 1}),
        )
    )
    assert space.active({"a": False, "b": True, "c": True}) == {"a": False}
    assert space.contains({"a": True, "b": True, "c": False})


@pytest.mark.parametrize(
    "knobs",
    [
        (),
        (SEQS, SEQS),
        (
            Knob("a", KnobKind.CATEGORICAL, choices=(1,), requires={"b": 1}),
            Knob("b", KnobKind.CATEGORICAL, choices=(1,), requires={"a": 1}),
        ),
    ],
)
def test_a_space_that_cannot_be_is_refused(knobs: Sequence[Knob]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Space(tuple(knobs))


def test_a_neighbour_differs_in_one_knob() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        near, changed = SPACE.neighbour(INSIDE, rng, structural=0.5, spread=0.1)
        differing = {name for name in INSIDE if near[name] != INSIDE[name]}
        assert differing == {changed}


def test_structural_chance_picks_the_sort_of_knob() -> None:
    rng = np.random.default_rng(0)
    structural = {SPACE.neighbour(INSIDE, rng, structural=1.0, spread=0.3)[1] for _ in range(50)}
    numeric = {SPACE.neighbour(INSIDE, rng, structural=0.0, spread=0.3)[1] for _ in range(50)}
    assert structural == {"enforce_eager", "block_size"}
    assert numeric == {"max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization"}


def test_a_cold_integer_still_moves_and_ends_turn_round() -> None:
    rng = np.random.default_rng(0)
    for value in (4, 60, 128):
        for _ in range(20):
            new = moved(SEQS, value, 0.0003, rng)
            assert isinstance(new, int)
            assert abs(new - value) == 1
            assert SEQS.holds(new)


def test_scales_go_there_and_back() -> None:
    for knob in (SEQS, KNOBS["kv_cache_memory_bytes"], KNOBS["long_prefill_token_threshold"]):
        for value in (int(knob.low), int(knob.high)):
            assert from_unit(knob, float(to_unit(knob, np.array(float(value))))) == value
    assert [from_unit(MEMORY, share) for share in (0.0, 0.5, 1.0)] == [0.6, 0.775, 0.95]


def test_the_ends_of_an_integer_range_are_as_likely_as_its_middle() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw(ONE_INT.knobs[0], rng) for _ in range(3000)]
    assert all(900 < drawn.count(value) < 1100 for value in (1, 2, 3))
