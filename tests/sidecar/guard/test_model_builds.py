"""The helper process: bounded in time and memory, restarted after a failure, and asked each question once."""

import json
import sys
import time
from pathlib import Path

import pytest

from sidecar.guard.model_builds import HelperBuilds, installed_vllm, model_of
from vllm_sloguard.agent.build_helper import BuildHelper

FACTS = {
    "stages": [{"weights_bytes": 8, "embedding_bytes": 4, "bytes_per_block": 2, "bytes_per_token": 1}],
    "groups": [{"kind": "full", "block_size": 16}],
    "platform": "cpu",
    "max_model_len": 64,
    "hidden": 8,
    "vocab": 16,
    "block_size": 16,
}
ANSWERS = f"import sys\nfor line in sys.stdin: print('''{json.dumps(FACTS)}''', flush=True)"
HANGS = "import time\ntime.sleep(60)"
DIES = "import sys\nsys.stdin.readline()\nsys.exit(9)"


def python_that(folder: Path, script: str) -> str:
    """A Python that runs ``script`` instead of its arguments, and counts its starts."""
    (folder / "script.py").write_text(f"open({str(folder / 'starts')!r}, 'a').write('x')\n{script}")
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nexec {sys.executable} {folder / 'script.py'}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_an_answer_is_asked_once_and_stored(model: Path) -> None:
    helper = BuildHelper(python_that(model, ANSWERS))
    found = HelperBuilds("0.32.0", helper).built(model, {})
    assert found is not None
    assert found.weights_bytes == 8
    # Other arguments are asked of the same process, the same ones of the disk.
    assert HelperBuilds("0.32.0", helper).built(model, {"dtype": "float32"}) == found
    assert (model / "starts").read_text() == "x"
    helper.close()
    nobody = HelperBuilds("0.32.0", BuildHelper("/does/not/exist"))
    assert nobody.built(model, {}) == found
    assert nobody.built(model, {"dtype": "float16"}) is None


@pytest.mark.parametrize("script", [HANGS, DIES, "print('no JSON', flush=True)\nimport time\ntime.sleep(60)"])
def test_no_answer_in_time_is_none_and_is_not_asked_again_at_once(model: Path, script: str) -> None:
    helper = BuildHelper(python_that(model, script), timeout_s=1.0)
    builds, began = HelperBuilds("0.32.0", helper), time.monotonic()
    for _ in range(50):
        assert builds.built(model, {}) is None
    assert time.monotonic() - began < 3
    assert (model / "starts").read_text() == "x"
    assert builds.built(model, {"dtype": "float32"}) is None
    assert (model / "starts").read_text() == "xx"
    helper.close()


def test_a_python_without_vllm_is_not_asked(model: Path) -> None:
    assert installed_vllm("/does/not/exist") == ""
    known = model_of(str(model), "/does/not/exist")
    assert known.builds is None
    assert model_of("no/model", sys.executable).problem.startswith("no config.json of no/model on this machine")
