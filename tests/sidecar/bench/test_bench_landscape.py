"""The validation of landscape files, and how their results are judged."""

import math
from pathlib import Path
from typing import Any

import pytest
from bench_cases import INSTANCE, SOURCE, generator, slope, write

from sidecar.bench.landscape import Host, LandscapeError, landscape_verdict, load_landscapes
from sidecar.search.contract import ObservedStatus
from vllm_sloguard.knobs import Knob, KnobKind

SLO = {"ttft_p99_ms": 400.0, "itl_p99_ms": 50.0}
GOOD = {"status": "feasible", "ttft_p99_ms": 200.0, "itl_p99_ms": 50.0, "latency_ms": 900.0, "cost_s": 70.0}


def judged(**changes: Any) -> Any:
    return landscape_verdict("here", {**GOOD, **changes}, SLO)


def test_a_file_becomes_a_landscape(tmp_path: Path) -> None:
    landscape = slope(tmp_path)

    assert landscape.space.knobs == (Knob("max_num_seqs", KnobKind.INT, 4, 128, log=True),)
    assert landscape.host == Host(80, 79, 15, 131072, 2048)
    assert landscape.slo == {"ttft_p99_ms": 400.0}
    assert landscape.incumbent == {"max_num_seqs": 32, "max_model_len": 2048}
    assert all(isinstance(value, int) for value in landscape.incumbent.values())
    assert landscape.fast_ms == 500
    assert landscape.best_known_ms is None


@pytest.mark.parametrize(
    "ending",
    [
        "LANDSCAPES = {'slope': Slope}",
        "import sys\none = Slope()\nfor n in ('space', 'host', 'slo', 'incumbent', 'evaluate'):\n"
        "    globals()[n] = getattr(one, n)\nLANDSCAPES = {'slope': sys.modules[__name__]}",
    ],
    ids=["a class", "a module"],
)
def test_it_may_be_other_than_an_instance(tmp_path: Path, ending: str) -> None:
    landscape = slope(tmp_path, f"{SOURCE}\n{ending}\n")

    assert landscape.evaluate(landscape.incumbent, generator()).outcome is ObservedStatus.FEASIBLE


def test_every_type_of_knob_is_read(tmp_path: Path) -> None:
    space = """{
        "a": {"type": "float", "low": 0, "high": 1, "choices": None},
        "b": {"type": "categorical", "choices": [True, False], "low": None, "high": None, "log": False},
        "c": {"type": "categorical", "choices": ("x", 16), "requires": {"b": True}},
        "d": {"type": "int", "low": 7, "high": 7},
    }"""
    text = INSTANCE.replace('{"max_num_seqs": {"type": "int", "low": 4.0, "high": 128.0, "log": True}}', space)

    assert slope(tmp_path, text).space.knobs == (
        Knob("a", KnobKind.FLOAT, 0, 1),
        Knob("b", KnobKind.CATEGORICAL, choices=(True, False)),
        Knob("c", KnobKind.CATEGORICAL, choices=("x", 16), requires={"b": True}),
        Knob("d", KnobKind.CATEGORICAL, choices=(7,)),
    )


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("LANDSCAPES =", "OTHERS =", "LANDSCAPES must be a mapping"),
        ("def slo(", "def no_slo(", "slope: has no slo()"),
        ('"type": "int"', '"type": "number"', "max_num_seqs: type must be one of int, float, categorical"),
        ('"low": 4.0', '"low": 400', "low must be below high"),
        ("class Slope:", "class Slope(:", "cannot be loaded"),
        ('return {"ttft_p99_ms": 400.0}', "return 400", "expected a mapping"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, old: str, new: str, wanted: str) -> None:
    path = write(tmp_path, INSTANCE.replace(old, new))

    with pytest.raises(LandscapeError, match=wanted.replace("(", r"\(").replace(")", r"\)")) as raised:
        load_landscapes(path)

    assert "\n" not in str(raised.value)


def test_an_unknown_name_or_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LandscapeError, match="no landscape is called 'hill'; there are slope"):
        load_landscapes(write(tmp_path), "hill")
    with pytest.raises(LandscapeError, match="there is no such file"):
        load_landscapes(tmp_path / "absent.py")


def test_what_lies_beside_a_file_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "beside_the_landscape.py").write_text("LIMIT = 300.0\n", encoding="utf-8")
    text = INSTANCE.replace("400.0", "LIMIT")

    assert slope(tmp_path, f"from beside_the_landscape import LIMIT\n{text}").slo == {"ttft_p99_ms": 300.0}


def test_a_limit_that_is_met_exactly_is_met() -> None:
    result = judged()

    assert (result.outcome, result.violation, result.latency_ms) == (ObservedStatus.FEASIBLE, 0, 900)
    assert result.margins == {"ttft_p99_ms": -0.5, "itl_p99_ms": 0}


def test_the_status_alone_makes_nothing_feasible() -> None:
    result = judged(ttft_p99_ms=600.0)

    assert (result.outcome, result.violation) == (ObservedStatus.INFEASIBLE, 0.25)
    assert result.margins == {"ttft_p99_ms": 0.5, "itl_p99_ms": 0}


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf, "fast", True])
@pytest.mark.parametrize("key", ["ttft_p99_ms", "itl_p99_ms", "latency_ms"])
def test_unmeasured_is_never_feasible(key: str, nothing: object) -> None:
    result = judged(**{key: nothing})

    assert result.outcome is ObservedStatus.INFEASIBLE
    assert 0 < result.violation < math.inf


def test_a_missing_key_is_unmeasured() -> None:
    answer = {key: value for key, value in GOOD.items() if key != "itl_p99_ms"}

    assert landscape_verdict("here", answer, SLO).outcome is ObservedStatus.INFEASIBLE
    assert landscape_verdict("here", answer, {"ttft_p99_ms": 400.0}).outcome is ObservedStatus.FEASIBLE


def test_what_misses_a_limit_that_is_not_reported_stays_infeasible() -> None:
    result = judged(status="infeasible")

    assert result.outcome is ObservedStatus.INFEASIBLE
    assert result.violation == pytest.approx(1 / 3)


def test_a_crash_needs_nothing_else() -> None:
    result = landscape_verdict("here", {"status": "crashed"}, SLO)

    assert (result.outcome, result.crash_kind, result.violation, result.cost_s) == (
        ObservedStatus.CRASHED,
        "unknown",
        math.inf,
        0,
    )
    assert result.margins is None
    assert result.latency_ms is None


def test_an_unknown_status_is_an_error() -> None:
    with pytest.raises(LandscapeError, match="status must be one of feasible, infeasible, crashed, got 'ok'"):
        judged(status="ok")


def test_an_evaluation_that_raises_is_named(tmp_path: Path) -> None:
    with pytest.raises(LandscapeError, match=r"slope: evaluate\({}\) raised KeyError"):
        slope(tmp_path).evaluate({}, generator())
