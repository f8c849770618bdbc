"""What a search may set, and what reaches vLLM's command line."""

import argparse
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_service import fake_config
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sidecar.config.schema import ConfigError, SearchConfig, load_config
from sidecar.guard.guard import Guard
from sidecar.record.trial import Role
from sidecar.search.contract import Context, Observation, ObservedStatus
from sidecar.search.registry import OPTIMIZERS, make
from sidecar.search.space import Space
from vllm_sloguard.agent.serve_command import flags
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.repair import TUNED
from vllm_sloguard.knobs import KNOBS, KnobKind

# They run code, open the service to others, or take a lock off it.
NEVER = [
    "middleware", "trust_remote_code", "host", "port", "uds", "api_key", "hf_token", "model", "tokenizer", "revision",
    "code_revision", "download_dir", "load_format", "allowed_local_media_path", "allowed_origins", "ssl_keyfile",
    "chat_template", "tool_parser_plugin", "logits_processors", "worker_extension_cls", "worker_cls",
    "enable_log_requests", "kv_transfer_config", "additional_config", "config", "plugins",
]  # fmt: skip
CPU = Machine("cpu", 2**34, 2**34, 0, "meminfo")


@pytest.mark.parametrize(
    ("name", "value"),
    [("enable_chunked_prefill", "--trust-remote-code"), ("kv_cache_dtype", "--trust-remote-code"), ("block_size", "1")],
)
def test_a_text_that_would_be_a_flag_is_refused(tmp_path: Path, name: str, value: str) -> None:
    assert f"knobs.{name}: " in refused(fake_config(tmp_path), knobs={name: {"choices": [value]}})
    assert f"unguarded.0.{name}: " in refused(fake_config(tmp_path), unguarded=[{name: value}])
    assert "unguarded.0.max_num_seqs: " in refused(fake_config(tmp_path), unguarded=[{"max_num_seqs": [value]}])


def refused(path: Path, **search: Any) -> str:
    content = yaml.safe_load(path.read_text())
    content["search"] |= search
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    return str(raised.value)


@pytest.mark.parametrize("name", [*NEVER, *(name.replace("_", "-") for name in NEVER if "_" in name), "--host"])
def test_no_search_may_touch_it(tmp_path: Path, name: str) -> None:
    path = fake_config(tmp_path)
    refusal = refused(path, knobs={name: {"choices": ["a", "b"]}})
    assert f"search.knobs.{name}: not a knob; " in refusal
    assert "allowed: max_num_seqs" in refusal
    path = fake_config(tmp_path)
    assert "not a knob; " in refused(path, unguarded=[{name: "a"}])


def test_neither_knobs_nor_repair_know_of_them() -> None:
    assert not set(NEVER) & {*KNOBS, *TUNED}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_proposes_knobs_of_its_space_alone(optimizer: str) -> None:
    space = Space(tuple(KNOBS.values()))
    incumbent = {"max_num_seqs": 16, "trust_remote_code": True, "middleware": "a.b"}
    history = [Observation(incumbent, ObservedStatus.FEASIBLE, 0.0, -100.0)]
    rng = random.Random(0)
    for _ in range(3):
        proposal = make(optimizer, space, 0, 5, Context(incumbent=incumbent)).ask(history)
        assert set(proposal.config) <= set(KNOBS)
        history.append(Observation(proposal.config, ObservedStatus.FEASIBLE, 0.0, -rng.uniform(50, 200)))


def test_what_the_operator_has_set_stays_and_is_not_repaired_away(tmp_path: Path) -> None:
    config = load_config(fake_config(tmp_path))
    incumbent = {**config.engine.args, "trust_remote_code": True}
    guard = Guard(config, lambda _: CPU)
    proposal = make("random", Space(config.search.space_knobs()), 0, 5).ask([])
    args = guard.plan(incumbent, proposal, Role.SEARCH).args
    assert set(args) <= {*incumbent, *KNOBS, *TUNED}
    assert args["trust_remote_code"] is True


# vLLM reads its command line with argparse; these are the knobs, and what nobody may smuggle in beside them.
PARSER = argparse.ArgumentParser(exit_on_error=False)
for knob in KNOBS.values():
    two = set(knob.choices) == {True, False} and knob.kind is KnobKind.CATEGORICAL
    action: Any = argparse.BooleanOptionalAction if two else "store"
    PARSER.add_argument(f"--{knob.name.replace('_', '-')}", action=action)
PARSER.add_argument("--trust-remote-code", action="store_true")
PARSER.add_argument("--middleware", action="append", default=[])
TEXTS = st.text(max_size=20) | st.sampled_from(
    [
        "--trust-remote-code",
        "--middleware=a",
        "a --trust-remote-code",
        "; id",
        "$(id)",
        "a\n--middleware\na",
        "-m",
        "--",
    ]
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(KNOBS)), TEXTS | st.integers() | st.booleans(), min_size=1))
def test_a_value_is_never_a_flag_of_its_own(args: dict[str, Any]) -> None:
    try:
        SearchConfig(knobs={"max_num_seqs": None}, unguarded=[args])
    except ValidationError:
        return  # refused with the file
    try:
        read, rest = PARSER.parse_known_args(flags(args))
    except argparse.ArgumentError:
        return  # vLLM would not start
    assert (read.trust_remote_code, read.middleware) == (False, [])
    assert "--trust-remote-code" not in rest
