"""When an engine is warm."""

import pytest

from vllm_sloguard.starts.warmup import Batch, batch_size, most, settled

COLD, WARM = Batch((0.5, 0.6), (0.05, 0.06, 0.05)), Batch((0.1, 0.12), (0.01, 0.011, 0.01))


@pytest.mark.parametrize(
    ("batches", "warm"),
    [
        ([], False),
        ([WARM], False),
        ([COLD, WARM], False),
        ([COLD, WARM, WARM], True),
        ([WARM, Batch((0.14,), (0.0115,))], True),
        ([WARM, Batch((0.2,), (0.01,))], False),  # the first token
        ([WARM, Batch((0.1,), (0.013,))], False),  # the tokens after it
        ([WARM, Batch((), ())], False),
        ([Batch((0.1,), ()), Batch((0.1,), ())], True),  # answers of one token
    ],
)
def test_two_batches_that_agree_are_warm(batches: list[Batch], warm: bool) -> None:
    assert settled(batches) is warm


@pytest.mark.parametrize(("least", "size", "bound"), [(0, 0, 0), (1, 1, 8), (4, 2, 16), (8, 4, 32), (9, 5, 40)])
def test_at_least_two_batches_and_a_bound(least: int, size: int, bound: int) -> None:
    assert (batch_size(least), most(least)) == (size, bound)
    assert 2 * size >= least
