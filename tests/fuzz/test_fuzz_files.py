"""Malformed files: each is read or refused in one clear line, and reading changes nothing."""

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from guard_cases import MODELS
from hypothesis import given
from hypothesis import strategies as st
from malformed import JUNK, broken_bytes, broken_values, contents, fuzzed, took

from sidecar.bench import landscape
from sidecar.cli import guard, study
from sidecar.config.schema import ConfigError, load_config
from vllm_sloguard.guard.start_history import Learned, LearnedLimit, LimitKind, ReportedStart, model_key, to_json

DEMO = (Path(__file__).parents[2] / "deploy" / "demo" / "sloguard.yaml").read_bytes()
RESULTS = "".join(
    json.dumps({"trial": n, "status": status, "avg_latency_ms": latency}) + "\n"
    for n, (status, latency) in enumerate(
        [("feasible", 812.5), ("crashed", None), ("infeasible", 2400), ("feasible", 903)]
    )
).encode()
GOOD_LEARNED = Learned(
    tuple(
        ReportedStart(
            {"max_num_seqs": 64 * n, "gpu_memory_utilization": 0.9, "enforce_eager": True, "dtype": "bfloat16"},
            "cuda",
            2**37,
            2**36 - 2**30 * n,
            100_000,
            vllm_version="0.26.0",
        )
        for n in (1, 2)
    ),
    tuple(
        LearnedLimit(kind, 2**14, {"max_num_seqs": 64, "max_model_len": 2**15}, "seen", 0.0, 4e9) for kind in LimitKind
    ),
    "0.26.0",
)
SMALL = MODELS[min(MODELS)]


def unchanged(folder: Path, attempt: Callable[[], object]) -> Callable[[], None]:
    """Runs ``attempt`` without output and asserts that no file below ``folder`` changed."""

    def checked() -> None:
        before = contents(folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                attempt()
        finally:
            assert contents(folder) == before

    return checked


@fuzzed
@given(
    st.one_of(
        broken_bytes(DEMO),
        broken_values(yaml.safe_load(DEMO)).map(lambda content: yaml.safe_dump(content).encode(errors="replace")),
        st.binary(max_size=200),
    )
)
def test_configurations(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "sloguard.yaml"
        path.write_bytes(content)
        took("configuration", unchanged(Path(name), lambda: load_config(path)), ConfigError)


@fuzzed
@given(
    st.one_of(
        broken_bytes(RESULTS),
        st.lists(broken_values(json.loads(RESULTS.split(b"\n")[0])), min_size=1).map(
            lambda rows: "\n".join(map(json.dumps, rows)).encode()
        ),
    )
)
def test_result_files(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        for run, lines in (("random_seed1", RESULTS), ("tba_seed1", content), ("tba_seed2", RESULTS)):
            (Path(name) / run).mkdir()
            (Path(name) / run / "results.jsonl").write_bytes(lines)
        took("result file", unchanged(Path(name), lambda: study.stats(Path(name))), ConfigError)


def asked_of_the_guard(model: Path, state: Path | None) -> None:
    """The two commands that read a model and the learned limits."""
    with contextlib.suppress(SystemExit):
        for as_json in (True, False):
            guard.budget(
                model=str(model),
                gpu_total_gib=80,
                gpu_free_gib=79,
                vllm_version="0.26",
                state=state,
                formula=True,
                as_json=as_json,
            )
    for arg in ([], ["max_num_seqs=100000", "gpu_memory_utilization=0.99"]):
        with contextlib.suppress(guard.typer.Exit):
            guard.repair_command(
                model=str(model),
                arg=arg,
                gpu_total_gib=80,
                gpu_free_gib=79,
                vllm_version="0.26",
                state=state,
                formula=True,
                as_json=True,
            )


@fuzzed
@given(
    st.one_of(
        broken_bytes(json.dumps(SMALL).encode()),
        st.sampled_from(sorted(MODELS))
        .flatmap(lambda name: broken_values(MODELS[name]))
        .map(lambda v: json.dumps(v).encode()),
    )
)
def test_models(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_bytes(content)
        attempt = unchanged(Path(name), lambda: asked_of_the_guard(Path(name), None))
        took("model config.json", attempt, ConfigError)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SMALL))
    return folder


@fuzzed
@given(
    st.one_of(
        broken_bytes(to_json(GOOD_LEARNED).encode()),
        broken_values(json.loads(to_json(GOOD_LEARNED))).map(lambda v: json.dumps(v).encode()),
    )
)
def test_what_was_learned(model: Path, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            # Of another model it would be left out.
            content = json.dumps({**json.loads(content), "model": model_key(str(model))}).encode()
        (Path(name) / "learned.json").write_bytes(content)
        attempt = unchanged(Path(name), lambda: asked_of_the_guard(model, Path(name)))
        took("learned.json", attempt, ConfigError)


LANDSCAPE = """
import json, math
from pathlib import Path
TOLD = json.loads(Path(__file__).with_name("told.json").read_text())
class Told:
    def __getattr__(self, name):
        return lambda *args: TOLD[name]
LANDSCAPES = {"told": Told()} if "LANDSCAPES" not in TOLD else TOLD["LANDSCAPES"]
"""
TOLD: dict[str, Any] = {
    "space": {
        "max_num_seqs": {"type": "int", "low": 4, "high": 64, "log": True},
        "enforce_eager": {"type": "categorical", "choices": [True, False], "requires": {"block_size": 16}},
    },
    "host": {"gpu_total_gib": 80, "gpu_free_gib": 79, "weights_gib": 15, "kv_bytes_per_token": 131072},
    "slo": {"ttft_p99_ms": 500.0, "error_rate": 0.01},
    "incumbent": {"max_num_seqs": 16},
    "evaluate": {"status": "feasible", "latency_ms": 812.0, "ttft_p99_ms": 100.0, "error_rate": 0.0, "cost_s": 60.0},
    "best_known": 400.0,
    "fast_ms": 1000.0,
}


@fuzzed
@given(broken_values(TOLD) | st.fixed_dictionaries({"LANDSCAPES": JUNK}))
def test_landscapes(told: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "told.py"
        path.write_text(LANDSCAPE)
        (Path(name) / "told.json").write_text(json.dumps(told))

        def attempt() -> None:
            for found in landscape.load_landscapes(path).values():
                for config in ({}, {"max_num_seqs": 8}):
                    found.evaluate(config, landscape.np.random.default_rng(0))

        took("landscape", unchanged(Path(name), attempt), ConfigError)


def test_a_file_that_names_itself_without_an_end_is_read_in_time() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for place in ("engine: {args: {x: *i}}", "search: {unguarded: *i}", "model: *i", "workload: *i"):
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "sloguard.yaml"
            path.write_text(f"{bomb}{place}\n")
            began = time.thread_time()
            with pytest.raises(ConfigError):
                load_config(path)
            assert time.thread_time() - began < 10
