"""Landscapes with single requests are played through the sidecar's own stop rules and judge."""

from pathlib import Path

import numpy as np
import pytest
from bench_cases import SOURCE, slope

from sidecar.bench.landscape import Landscape, LandscapeError
from sidecar.bench.played_load import played, served_from
from sidecar.bench.simulate import SimulationOptions, simulate
from sidecar.measure.requests import to_the_end
from sidecar.search.contract import ObservedStatus

SERVING = """
    def serve(self, config, rng):
        seqs = config["max_num_seqs"]
        if seqs > 64:
            return {"crash": {"kind": "out_of_memory", "phase": "starting"}, "start_s": np.float64(20)}
        ttft_s = 0.005 * seqs * rng.uniform(0.98, 1.02)
        requests = [{"start_s": n // 2, "ttft_s": np.float32(ttft_s), "e2e_s": 2 * ttft_s,
                     "itls_s": np.full(4, ttft_s / 4)} for n in range(120)]
        return {"start_s": 30, "planned": 120, "requests": requests}
"""


def serving(folder: Path, method: str = SERVING) -> Landscape:
    source = SOURCE[: SOURCE.index("    def evaluate")]
    return slope(folder, f"import numpy as np\n{source}{method}\nLANDSCAPES = {{'slope': Slope()}}\n")


def test_slower_loads_are_stopped_and_whole_loads_are_not(tmp_path: Path) -> None:
    landscape = serving(tmp_path)

    # A random search proposes what is slower than the best.
    early = simulate(landscape, "random", 1, SimulationOptions(8))
    whole = simulate(landscape, "random", 1, SimulationOptions(8, whole_loads=True))

    assert early.best is not None
    assert (early.best.whole, early.served_feasible) == (True, 1)
    assert any(not t.whole for t in early.trials)
    assert all(t.whole for t in whole.trials)
    assert sum(t.measured_s for t in early.trials) < 0.8 * sum(t.measured_s for t in whole.trials)


def test_a_crash_is_a_crash_whatever_its_kind(tmp_path: Path) -> None:
    run = simulate(serving(tmp_path), "random", 0, SimulationOptions(10))

    crashed = [t for t in run.trials if t.verdict.outcome is ObservedStatus.CRASHED]
    assert {t.verdict.crash_kind for t in crashed} == {"out_of_memory"}
    assert {t.verdict.cost_s for t in crashed} == {20}


def test_failed_requests_and_missing_fields_are_read() -> None:
    served = served_from(
        "here",
        {"requests": [{"start_s": 1, "e2e_s": 2}, {"start_s": 0, "ttft_s": None, "e2e_s": None, "error": "timeout"}]},
    )

    load = played(served, to_the_end)
    assert [r.error for r in load.requests] == ["timeout", ""]
    assert load.requests[1].ttft_s == 2
    assert load.duration_s == 3


@pytest.mark.parametrize("answer", ["None", "{}", "{'requests': [3]}"])
def test_what_cannot_be_read_names_the_landscape(tmp_path: Path, answer: str) -> None:
    landscape = serving(tmp_path, f"    def serve(self, config, rng):\n        return {answer}\n")

    with pytest.raises(LandscapeError, match="slope: serve"):
        landscape.serve(landscape.incumbent, np.random.default_rng(0))
