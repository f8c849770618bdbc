"""The prior for eager mode before it was tried."""

import math

import pytest
from search_cases import INCUMBENT, feasible, with_margins

from sidecar.search.latency_priors import EAGER, eager_effect

SEEN = with_margins(feasible(INCUMBENT, -500.0), itl_p99_ms=-0.9)


def test_eager_mode_costs_less_where_a_step_takes_longer() -> None:
    fast, slow = eager_effect([SEEN], 50.0), eager_effect([SEEN], 1000.0)
    assert fast == pytest.approx(math.log(math.hypot(1.0, 18.0 / 5.0)))
    assert 0 < slow < 0.1 < fast


def test_without_a_time_between_tokens_the_effect_is_the_usual() -> None:
    eager = with_margins(feasible({**INCUMBENT, "enforce_eager": True}, -500.0), itl_p99_ms=-0.9)
    assert eager_effect([SEEN], None) == EAGER
    assert eager_effect([eager], 50.0) == EAGER
    assert eager_effect([with_margins(SEEN, itl_p99_ms=math.inf)], 50.0) == EAGER
