"""Prompts from a file through vLLM's benchmark: the configuration, and the arguments passed to vLLM."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from sidecar_cases import GOOD, write

from sidecar.config.schema import Config, ConfigError, Workload, load_config
from sidecar.measure.load_client import benchmark_argv
from sidecar.promote import provenance
from sidecar.record.decisions import Provenance
from sidecar.record.run_snapshot import setup_of

LENGTHS = {"input_tokens": 300, "output_tokens": 80}


def workload(folder: Path, **fields: Any) -> Config:
    return load_config(write(folder, {**GOOD, "workload": {"rate": 4, **fields}}))


def argv(given: Workload) -> list[str]:
    return benchmark_argv(given, "http://127.0.0.1:1", "model", "tokenizer")


def test_random_prompts_stay_the_default(tmp_path: Path) -> None:
    told = argv(workload(tmp_path).workload)

    assert told[told.index("--dataset-name") + 1] == "random"
    assert told[told.index("--random-input-len") + 1] == "512"
    assert not {"--dataset-path", "--custom-output-len", "--skip-chat-template"} & set(told)


def test_a_file_beside_the_configuration_is_found(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "output_tokens": 4}\n')
    config = workload(tmp_path, dataset_name="custom", dataset_path="prompts.jsonl", **LENGTHS)
    told = argv(config.workload)

    assert told[told.index("--dataset-path") + 1] == str(tmp_path / "prompts.jsonl")
    assert told[told.index("--custom-output-len") + 1] == "-1"  # each line's own
    assert not [flag for flag in told if flag.startswith("--random")]
    # The guard leaves room for the longest one.
    assert config.workload.longest_request_tokens == 381


def test_the_answers_of_conversations_say_how_long_they_are(tmp_path: Path) -> None:
    (tmp_path / "chats.json").write_text("[]")
    told = argv(workload(tmp_path, dataset_name="sharegpt", dataset_path="chats.json", **LENGTHS).workload)

    assert told[told.index("--dataset-name") + 1] == "sharegpt"
    assert not [flag for flag in told if flag.endswith("output-len")]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dataset_name": "hf"}, "workload.dataset_name: 'hf': should be 'random', 'sharegpt' or 'custom'"),
        ({"dataset_name": "custom", **LENGTHS}, "dataset_path: a file is required"),
        ({"dataset_path": "a.jsonl", **LENGTHS}, "dataset_path: a file is only for a dataset_name other than random"),
        ({"dataset_name": "custom", "dataset_path": "a.jsonl"}, "input_tokens and output_tokens"),
        ({"dataset_name": "custom", "dataset_path": "a.jsonl", **LENGTHS}, "a.jsonl: there is no such file"),
    ],
)
def test_what_does_not_go_together_is_one_line(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        workload(tmp_path, **fields)

    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_decision_with_a_file_can_be_recorded(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    config = workload(tmp_path, dataset_name="custom", dataset_path="prompts.jsonl", **LENGTHS)
    origin = TypeAdapter(Provenance).dump_python(provenance.of(config, []), mode="json")

    assert origin["workload"]["dataset_path"] == str(tmp_path / "prompts.jsonl")
    recorded = setup_of(json.loads(config.model_dump_json()), 1)
    assert recorded.workload == config.workload
    assert "custom" in recorded.workload.prompts


def test_another_file_is_another_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("[]")
    first, other = (workload(tmp_path, dataset_name="sharegpt", dataset_path=n, **LENGTHS).digest() for n in "ab")

    assert first != other
