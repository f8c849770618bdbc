"""The JSON schema of the file: it accepts the example files, and refuses the mistakes that editors can mark."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from sidecar_cases import GOOD, changed

from sidecar.config.json_schema import config_schema

ROOT = Path(__file__).parents[3]
VALIDATOR = Draft202012Validator(config_schema())


def places(content: Any) -> list[str]:
    """Where the schema finds mistakes, with the reason."""
    found = VALIDATOR.iter_errors(content)  # pyright: ignore[reportUnknownMemberType]
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(config_schema())
    assert sys.prefix not in json.dumps(config_schema())  # nothing of the machine that printed it


@pytest.mark.parametrize("name", ["deploy/demo/sloguard.yaml", "deploy/sloguard-gpu.yaml"])
def test_it_accepts_the_example_files(name: str) -> None:
    assert places(yaml.safe_load((ROOT / name).read_text())) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("window.duration", "45m"),
        ("window.notice", 0),
        ("engine.args", {"max-num-seqs": 8, "compilation-config": {"level": 3}, "trust-remote-code": None}),
        ("engine.args", {"an-argument-of-tomorrow": 1, "compilation-config.mode": 3}),
        ("search.knobs", {"max_num_seqs": None, "block_size": {"choices": [16]}}),
    ],
)
def test_it_accepts(place: str, value: Any) -> None:
    assert places(changed(place, value)) == []


@pytest.mark.parametrize(
    ("place", "value", "where"),
    [
        ("worklod", {"rate": 4}, ""),
        ("slo.ttft_p99_ms", "2s", "slo.ttft_p99_ms"),
        ("slo.ttft_p75_ms", 5, "slo"),
        ("window.duration", 45, "window.duration"),
        ("engine.args", {"api-key": "x"}, "engine.args.api-key"),
        ("engine.args", {"enforce-eager": "yes"}, "engine.args.enforce-eager"),
        ("search.knobs", {"tempo": None}, "search.knobs"),
        ("search.knobs", {"max_num_seqs": {"choices": [1]}}, "search.knobs.max_num_seqs"),
    ],
)
def test_it_refuses(place: str, value: Any, where: str) -> None:
    assert [found.partition(": ")[0] for found in places(changed(place, value))] == [where]


def test_the_command_prints_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sidecar", "schema"], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == config_schema()
    assert places(GOOD) == []
