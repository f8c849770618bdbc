"""Engine arguments as flags, and as a file that round-trips."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.engine.config_yaml import config_yaml
from vllm_sloguard.agent.serve_command import flags


def test_flags() -> None:
    args: dict[str, Any] = {
        "max_num_seqs": 8,
        "gpu_memory_utilization": 0.9,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_dtype": "auto",
        "middleware": ["a b", "c"],
    }

    assert flags(args) == [
        *("--max-num-seqs", "8"),
        *("--gpu-memory-utilization", "0.9"),
        "--enforce-eager",
        "--no-enable-prefix-caching",
        *("--kv-cache-dtype", "auto"),
        *("--middleware", "a b", "c"),
    ]


def test_no_arguments_are_no_flags() -> None:
    assert flags({}) == []


@pytest.mark.parametrize(
    "value",
    [
        *("on", "off", "yes", "1e3", "0x10", "012", "1_000", "1:30", "2026-01-01", "null", "~", "", " ", "#", "a # b"),
        *(
            "a: b",
            "- a",
            "{}",
            "[",
            "*a",
            "&a",
            "!x",
            "|",
            ">",
            "%",
            "@",
            "`",
            "'",
            '"',
            "\\",
            "a\nb",
            "\t",
            "é",
            "日本",
        ),
        *("😀", "\u2028", "\x85", True, False, 0, -1, 2**46, 0.5, 1e300, 1e-7, ["on", "1"], []),
    ],
)
def test_file_reads_back_as_it_was(value: Any) -> None:
    text = config_yaml("a/model", {"some_name": value}, ["why"])

    read: dict[str, Any] = yaml.safe_load(text)

    assert read == {"model": "a/model", "some-name": value}
    assert type(read["some-name"]) is type(value)


SCALARS = st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-1e6, 1e6) | st.text()


@settings(max_examples=100)
@given(
    model=st.text(),
    value=SCALARS | st.lists(st.text(), max_size=3),
    comments=st.lists(st.text(st.sampled_from("#:'\"\n\r é-{[&*"), max_size=9), max_size=3),
)
def test_any_model_argument_and_comment_read_back(model: str, value: Any, comments: list[str]) -> None:
    read: dict[str, Any] = yaml.safe_load(config_yaml(model, {"some_name": value}, comments))

    assert read == {"model": model, "some-name": value}


def test_comments_are_comments_line_by_line() -> None:
    text = config_yaml("m", {}, ["one\nmodel: other", ""])

    assert text.splitlines() == ["# one", "# model: other", "#", "model: m"]
