"""The stop rules on recorded loads, through the benchmark's own replay."""

import pytest
from early_stop import LOADS, Outcome, replays
from recorded_loads import read


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    # Every other one: all of them take twice as long, and benchmarks/early_stop.py reports on them.
    return replays(read(LOADS)[::2], fixed=True)


def test_loads_that_miss_take_less_than_half_of_their_time(outcomes: list[Outcome]) -> None:
    missed = [o for o in outcomes if not o.met]

    assert len(missed) >= 15
    assert sum(o.ended_s for o in missed) < 0.5 * sum(o.full_s for o in missed)
    assert {"SLO missed", "over-saturated"} <= {o.reason for o in missed}


def test_no_good_load_is_stopped(outcomes: list[Outcome]) -> None:
    good = [o for o in outcomes if o.met]

    assert len([o for o in good if "eased" not in o.recorded.name]) >= 15
    assert [o.recorded.name for o in good if o.stopped] == []
