"""Command lines of existing services."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sloguard.agent.command_flags import CommandLine, UnreadableCommandError, read_command
from vllm_sloguard.agent.serve_command import Args, flags


def test_vllm_serve() -> None:
    line = "vllm serve some/model --host 0.0.0.0 --port 9000 --max-num-seqs=64 --gpu-memory-utilization 0.9"
    line += " --enforce-eager --no-enable-prefix-caching -tp 2 --served-model-name a b --kv-cache-dtype auto"
    assert read_command(line.split()) == CommandLine(
        "some/model",
        {
            "max_num_seqs": 64,
            "gpu_memory_utilization": 0.9,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "tensor_parallel_size": 2,
            "served_model_name": ["a", "b"],
            "kv_cache_dtype": "auto",
        },
        "0.0.0.0",  # noqa: S104 - a command line
        9000,
    )


@pytest.mark.parametrize(
    "line",
    [
        "/usr/bin/vllm serve m --shutdown-timeout 5",
        "python3 -W ignore -m vllm.entrypoints.openai.api_server --model m --shutdown-timeout 5",
        "python -m vllm.entrypoints.cli.main serve --model m --shutdown-timeout 5",
    ],
)
def test_ways_to_start_the_server(line: str) -> None:
    assert read_command(line.split()) == CommandLine("m", {}, "", 8000, 5)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("sleep 5", "neither"),
        ("python server.py", "neither"),
        ("vllm bench serve", "not `vllm serve`"),
        ("vllm serve", "no model"),
        ("vllm serve --max-num-seqs 5", "no model"),
        ("vllm serve m --config a.yaml", "--config file"),
        ("vllm serve m --uds /tmp/a", "Unix socket"),
        ("vllm serve m --port x", "--port"),
        ("vllm serve m --compilation-config.level 3", "not a flag"),
        ("vllm serve m -x", "not a flag"),
    ],
)
def test_what_can_not_be_read_is_refused_with_the_reason(line: str, why: str) -> None:
    with pytest.raises(UnreadableCommandError, match=why):
        read_command(line.split())


names = st.sampled_from(["max_num_seqs", "gpu_memory_utilization", "enforce_eager", "kv_cache_dtype", "block_size"])
values = st.booleans() | st.integers() | st.floats(0.0625, 64, width=16) | st.sampled_from(["auto", "fp8", "a b"])


@given(st.dictionaries(names, values))
def test_flags_of_the_sidecar_read_back(args: Args) -> None:
    assert read_command(["vllm", "serve", "m", *flags(args)]).args == args
