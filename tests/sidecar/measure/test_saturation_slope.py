"""The Theil-Sen slope against scipy's."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.measure.saturation import lowest_slope

numbers = st.integers(0, 50).map(lambda n: n / 4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=60), st.sampled_from([0.9, 0.99]))
def test_it_is_scipys(points: list[tuple[float, float]], confidence: float) -> None:
    from scipy.stats import theilslopes  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    x, y = [x for x, _ in points], [y for _, y in points]
    expected = float(theilslopes(y, x, alpha=confidence).low_slope)  # pyright: ignore
    found = lowest_slope(x, y, confidence)
    assert found == pytest.approx(expected) or (math.isnan(found) and (math.isnan(expected) or len(set(x)) == 1))
