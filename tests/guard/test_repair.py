"""Repair changes what vLLM would refuse, nothing else, and says why."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sloguard.knobs import Config
from vllm_sloguard.machine import Machine
from vllm_sloguard.memory import GIB, estimate
from vllm_sloguard.model_shape import ModelShape, from_config
from vllm_sloguard.repair import Status, repair

from .models import DEEPSEEK, QWEN

SMALL = from_config(QWEN)
# About 7 billion parameters: 14.9 GiB in bf16.
LARGE = from_config(
    {
        **QWEN,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
)
WINDOWED = from_config({**QWEN, "use_sliding_window": True, "sliding_window": 4096})
H200 = Machine("cuda", int(139.81 * GIB), int(139.2 * GIB), 1, "NVML: NVIDIA H200")
CROWDED = Machine("cuda", int(139.81 * GIB), int(38.69 * GIB), 1, "NVML: NVIDIA H200")
CONSUMER = Machine("cuda", 24 * GIB, int(23.5 * GIB), 1, "NVML: RTX")
CPU = Machine("cpu", 16 * GIB, int(15.5 * GIB), 0, "meminfo")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"max_num_seqs": 0}, {}),
        ({"stream_interval": 0}, {"stream_interval": 1}),
        ({"max_model_len": 0}, {}),
        ({"gpu_memory_utilization": 0.0}, {"gpu_memory_utilization": 0.92}),
        ({"max_num_seqs": 256, "max_num_batched_tokens": 128}, {"max_num_seqs": 256, "max_num_batched_tokens": 256}),
        ({"max_num_seqs": 9000}, {"max_num_seqs": 9000, "max_num_batched_tokens": 9000}),
        (
            {"max_num_batched_tokens": 512, "max_model_len": 4096, "enable_chunked_prefill": False},
            {"max_num_batched_tokens": 4096, "max_model_len": 4096, "enable_chunked_prefill": False},
        ),
        ({"max_model_len": 65536}, {"max_model_len": 32768}),
        (
            {"max_model_len": 1024, "long_prefill_token_threshold": 2048},
            {"max_model_len": 1024, "long_prefill_token_threshold": 1024},
        ),
        ({"block_size": 7}, {"block_size": 16}),
    ],
)
def test_repairs_on_a_gpu(args: Config, expected: Config) -> None:
    outcome = repair(args, SMALL, H200)
    assert outcome.status is Status.REPAIRED
    assert outcome.args == expected
    for change in outcome.changes:
        assert (change.before, change.after) == (args.get(change.name), expected.get(change.name))
        assert change.reason


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"max_num_seqs": 256},
        {"max_num_batched_tokens": 512, "max_model_len": 4096},
        {"enable_chunked_prefill": False},
        {"enable_chunked_prefill": True, "enforce_eager": True},
        {"max_num_seqs": 1024, "max_model_len": 32768, "gpu_memory_utilization": 0.05},
        {"max_model_len": -1},
        {"block_size": 48, "an_argument_unknown_here": "x"},
    ],
)
def test_what_works_is_left_alone(args: Config) -> None:
    outcome = repair(args, SMALL, H200)
    assert (outcome.status, outcome.args, outcome.changes) == (Status.UNCHANGED, args, ())


def test_cpu_blocks_are_multiples_of_32() -> None:
    assert repair({"block_size": 16}, SMALL, CPU).args == {"block_size": 32}
    assert repair({"block_size": 16}, from_config({**DEEPSEEK, "n_routed_experts": 0}), CPU).status is Status.UNCHANGED


def test_a_share_is_lowered_to_what_is_free() -> None:
    outcome = repair({}, SMALL, CROWDED)
    assert outcome.status is Status.REPAIRED
    assert outcome.args == {"gpu_memory_utilization": 0.266}
    assert outcome.changes[0].reason == "requested 128.63 GiB exceed the 38.69 GiB that are free"
    # On CUDA a stated cache does not lift the check; on the CPU it does.
    assert "gpu_memory_utilization" in repair({"kv_cache_memory_bytes": GIB}, SMALL, CROWDED).args
    busy = Machine("cpu", 16 * GIB, 8 * GIB, 0, "meminfo")
    assert repair({"kv_cache_memory_bytes": GIB}, SMALL, busy).status is Status.UNCHANGED


def test_a_stated_cache_is_lowered_to_what_is_free() -> None:
    outcome = repair({"kv_cache_memory_bytes": 64 * GIB}, SMALL, CPU)
    assert outcome.status is Status.REPAIRED
    assert 8 * GIB < int(outcome.args["kv_cache_memory_bytes"]) < 12 * GIB


def test_a_length_is_lowered_to_what_fits() -> None:
    args: Config = {"gpu_memory_utilization": 0.72, "max_num_batched_tokens": 2048}
    outcome = repair(args, LARGE, CONSUMER)
    assert outcome.status is Status.REPAIRED
    assert int(outcome.args["max_model_len"]) < 32768
    assert outcome.budget is not None
    assert outcome.budget.starts
    assert outcome.budget.kv_tokens == int(outcome.args["max_model_len"]) + 16
    needed = repair(args, LARGE, CONSUMER, workload_max_len=32768)
    assert needed.status is Status.REFUSED
    assert "the workload needs 32768" in needed.refusal


@pytest.mark.parametrize(("kv_bytes", "block", "longest"), [(2**20, 32, 2016), (1_000_000, 128, 1792)])
def test_the_length_that_vllm_itself_proposes(kv_bytes: int, block: int, longest: int) -> None:
    """vLLM 0.32 on two starts that failed: "the estimated maximum model length is N"."""
    fields = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
    tiny = from_config({**QWEN, **fields, "num_attention_heads": 4})
    args: Config = {"kv_cache_memory_bytes": kv_bytes, "block_size": block, "max_model_len": 4096}
    assert repair(args, tiny, CPU).args == {**args, "max_model_len": longest}


def test_a_refusal_does_the_arithmetic() -> None:
    outcome = repair({"gpu_memory_utilization": 0.25}, LARGE, CONSUMER)
    assert outcome.status is Status.REFUSED
    assert outcome.args == {"gpu_memory_utilization": 0.25}
    assert outcome.refusal == (
        "weights 14.96 GiB + activations 0.23 GiB + overhead 0.39 GiB exceed 0.25 x 24.0 GiB; needs utilization ≥ 0.65"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_num_seqs": "many"}, "max_num_seqs has the wrong type: 'many'"),
        ({"max_num_seqs": True}, "max_num_seqs has the wrong type: True"),
        ({"max_model_len": 1024.0}, "max_model_len has the wrong type: 1024.0"),
        ({"enforce_eager": 1}, "enforce_eager has the wrong type: 1"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization has the wrong type: '0.9'"),
        ({"tensor_parallel_size": 5}, "12 attention heads cannot be divided over tensor_parallel_size 5"),
    ],
)
def test_what_cannot_be_mended_is_refused(args: Config, message: str) -> None:
    outcome = repair(args, SMALL, H200)
    assert (outcome.status, outcome.refusal, outcome.changes) == (Status.REFUSED, message, ())


def test_pins_send_repair_to_the_other_argument() -> None:
    args: Config = {"max_num_seqs": 256, "max_num_batched_tokens": 128}
    assert repair(args, SMALL, H200, pinned=frozenset({"max_num_batched_tokens"})).args["max_num_seqs"] == 128
    both = repair(args, SMALL, H200, pinned=frozenset(args))
    assert both.status is Status.REFUSED
    assert both.refusal.endswith("pinned: max_num_batched_tokens, max_num_seqs")
    split: Config = {"max_num_batched_tokens": 512, "max_model_len": 4096, "enable_chunked_prefill": False}
    assert (
        repair(split, SMALL, H200, pinned=frozenset({"max_num_batched_tokens"})).args["enable_chunked_prefill"] is True
    )
    rest = frozenset({"max_num_batched_tokens", "enable_chunked_prefill"})
    assert repair(split, SMALL, H200, pinned=rest).args["max_model_len"] == 512
    assert repair(split, SMALL, H200, pinned=rest, workload_max_len=1024).status is Status.REFUSED


def test_less_is_repaired_where_less_is_known() -> None:
    assert (
        repair({"max_num_seqs": 4096, "block_size": 7, "max_model_len": 10**6}, None, None).status is Status.UNCHANGED
    )
    assert repair({"max_num_seqs": 64, "max_num_batched_tokens": 8}, None, None).args["max_num_batched_tokens"] == 64


ARGS: dict[str, st.SearchStrategy[Any]] = {
    "max_num_seqs": st.integers(-1, 20_000),
    "max_num_batched_tokens": st.integers(-1, 200_000),
    "max_model_len": st.integers(-2, 70_000),
    "enable_chunked_prefill": st.booleans(),
    "enforce_eager": st.booleans(),
    "block_size": st.integers(-1, 300),
    "gpu_memory_utilization": st.floats(-0.1, 1.2) | st.just(float("nan")),
    "kv_cache_memory_bytes": st.integers(-1, 2**40),
    "kv_cache_dtype": st.sampled_from(["auto", "fp8"]),
    "long_prefill_token_threshold": st.integers(-1, 70_000),
    "stream_interval": st.integers(-1, 8),
    "tensor_parallel_size": st.integers(0, 4),
}
CASES = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([None, SMALL, LARGE, WINDOWED, from_config(DEEPSEEK)]),
        "machine": st.sampled_from([None, H200, CROWDED, CONSUMER, CPU]),
        "pinned": st.frozensets(st.sampled_from(sorted(ARGS)), max_size=3),
        "workload_max_len": st.none() | st.integers(1, 40_000),
    }
)


@settings(max_examples=600, deadline=None)
@given(args=st.fixed_dictionaries({}, optional=ARGS), case=CASES)
def test_properties(args: dict[str, Any], case: dict[str, Any]) -> None:
    shape: ModelShape | None = case["shape"]
    machine: Machine | None = case["machine"]
    first = repair(args, **case)
    assert repair(dict(reversed(args.items())), **case).status is first.status
    assert "contradict" not in first.refusal
    if first.status is Status.REFUSED:
        assert first.args is args
        assert first.refusal
        return
    again = repair(first.args, **case)
    assert (again.status, again.args) == (Status.UNCHANGED, first.args)
    assert all(first.args.get(name) == args.get(name) for name in case["pinned"])
    before, after = args.get("max_model_len"), first.args.get("max_model_len")
    if after is not None and after != before:
        assert int(after) >= (case["workload_max_len"] or 1)
    changed = {name for name in {*args, *first.args} if args.get(name) != first.args.get(name)}
    assert {change.name for change in first.changes} == changed
    if shape is not None and machine is not None:
        assert first.budget == estimate(shape, first.args, machine)
