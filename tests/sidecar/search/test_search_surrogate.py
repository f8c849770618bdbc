"""A knob's prior effect counts until trials of that knob contradict it."""

import math

import numpy as np
from search_cases import INCUMBENT, SPACE, feasible, with_margins

from sidecar.search.encoding import Encoding
from sidecar.search.surrogate import Surrogate, learn

ENCODING = Encoding(SPACE)
SEATS = (4, 8, 16, 32, 64, 128)


def learned(power: float) -> Surrogate:
    """Fitted to trials whose TTFT is a power of max_num_seqs and depends on nothing else."""
    configs = [{**INCUMBENT, "max_num_seqs": seats} for seats in SEATS]
    excesses = [0.5 * (seats / 128) ** power * 4 ** -max(power, 0.0) - 1 for seats in SEATS]
    tried = [
        with_margins(feasible(config, -500.0), ttft_p99_ms=excess)
        for config, excess in zip(configs, excesses, strict=True)
    ]
    places = ENCODING.encode(configs)
    return learn(ENCODING, tried, places, places[-1], risk=None, priors=True)


def test_what_the_trials_agree_with_is_believed() -> None:
    (ttft,) = learned(-0.4).margins
    assert ttft.trust.all()


def test_what_they_contradict_is_not_but_what_they_did_not_test_is() -> None:
    (ttft,) = learned(0.8).margins
    trusted = {knob.name: bool(trust) for knob, trust in zip(SPACE.knobs, ttft.trust, strict=True)}
    assert trusted == {knob.name: knob.name != "max_num_seqs" for knob in SPACE.knobs}
    eager = ENCODING.encode([{**INCUMBENT, "enforce_eager": value} for value in (False, True)])
    slower = float(np.diff(ttft.prior(eager))[0])
    assert math.isclose(slower, 0.8 * ttft.eager)
