"""Repair changes only what vLLM would refuse, and gives the reason. Memory rules are in test_repair_memory.py."""

from typing import Any

import pytest
from guard_models import CPU, DEEPSEEK, H200, SMALL

from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB
from vllm_sloguard.guard.model_shape import from_config, stated
from vllm_sloguard.guard.repair import RepairStatus, repair
from vllm_sloguard.guard.rules import ALL
from vllm_sloguard.guard.rules.rule import Versions
from vllm_sloguard.knobs import KnobValues

MLA = from_config({**DEEPSEEK, "n_routed_experts": 0})


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
        ({"tensor_parallel_size": 5}, {"tensor_parallel_size": 4}),
        ({"kv_cache_dtype": "int4"}, {"kv_cache_dtype": "auto"}),
        ({"dtype": "fp16"}, {"dtype": "auto"}),
        ({"quantization": "gguf"}, {}),
        ({"quantization": "awq"}, {}),
        ({"quantization": "fbgemm_fp8"}, {}),
        ({"quantization": "online"}, {}),
        ({"quantization": "fp8", "dtype": "float32"}, {"quantization": "fp8", "dtype": "bfloat16"}),
        ({"quantization": "gpt_oss_mxfp4", "dtype": "half"}, {"quantization": "gpt_oss_mxfp4", "dtype": "bfloat16"}),
        ({"stream_interval": None}, {"stream_interval": 1}),
        ({"kv_cache_memory_bytes": 0}, {}),
        ({"max_num_batched_tokens": 10**30}, {}),
    ],
)
def test_repairs_on_a_gpu(args: dict[str, Any], expected: KnobValues) -> None:
    machine = Machine("cuda", H200.total_bytes, H200.free_bytes, 8, "NVML: NVIDIA H200")
    outcome = repair(args, SMALL, machine)
    assert outcome.status is RepairStatus.REPAIRED
    assert outcome.args == expected
    for change in outcome.changes:
        assert (change.before, change.after) == (args.get(change.name), expected.get(change.name))
        assert change.reason
        assert change.rules


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
        {"quantization": "FP8", "dtype": "half", "kv_cache_dtype": "fp8_e5m2"},
        {"quantization": "fbgemm_fp8", "allow_deprecated_quantization": True},
        # vLLM reads all of these as numbers.
        {"max_model_len": 1024.0, "block_size": "32", "gpu_memory_utilization": "0.9", "enforce_eager": 1},
        {"max_num_seqs": "8", "max_num_batched_tokens": " 1_024 "},
    ],
)
def test_what_works_is_left_alone(args: KnobValues) -> None:
    outcome = repair(args, SMALL, H200)
    assert (outcome.status, outcome.changes) == (RepairStatus.UNCHANGED, ())
    assert outcome.args is args


def test_text_is_no_number_where_vllm_computes_with_it() -> None:
    assert repair({"max_num_seqs": "8"}, SMALL, H200).args == {"max_num_seqs": 8}
    assert repair({"tensor_parallel_size": "1"}, SMALL, H200).args == {"tensor_parallel_size": 1}
    split: KnobValues = {"enable_chunked_prefill": "off", "max_model_len": 32768}
    assert repair(split, SMALL, CPU).args == {"enable_chunked_prefill": False, "max_model_len": 32768}


def test_cpu_blocks_are_multiples_of_32() -> None:
    assert repair({"block_size": 16}, SMALL, CPU).args == {"block_size": 32}
    assert repair({"block_size": 16}, MLA, CPU).status is RepairStatus.UNCHANGED


def test_mla_has_no_nvfp4_cache() -> None:
    assert repair({"kv_cache_dtype": "nvfp4"}, MLA, CPU).args == {"kv_cache_dtype": "auto"}
    assert repair({"kv_cache_dtype": "nvfp4_ds_mla"}, MLA, CPU).status is RepairStatus.UNCHANGED


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"tensor_parallel_size": 4}, {"tensor_parallel_size": 2}),
        ({"pipeline_parallel_size": 3}, {"pipeline_parallel_size": 2}),
        (
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 1},
        ),
    ],
)
def test_every_rank_has_a_gpu(args: KnobValues, expected: KnobValues) -> None:
    two = Machine("cuda", 80 * GIB, 79 * GIB, 2, "NVML")
    assert repair(args, SMALL, two).args == expected
    assert repair({**args, "nnodes": 2}, SMALL, two).status is RepairStatus.UNCHANGED


def test_a_model_of_which_only_sizes_are_known_has_no_heads() -> None:
    outcome = repair({"tensor_parallel_size": 2}, stated(2**31, 2**16, 4096), CPU)
    assert outcome.status is RepairStatus.UNCHANGED


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_num_seqs": "many"}, "max_num_seqs must be a whole number, got 'many'"),
        ({"max_num_seqs": 1.5}, "max_num_seqs must be a whole number, got 1.5"),
        ({"max_num_seqs": float("inf")}, "max_num_seqs must be a whole number, got inf"),
        ({"max_num_seqs": [1]}, "max_num_seqs must be a whole number, got [1]"),
        ({"max_num_seqs": [10**5000]}, "max_num_seqs must be a whole number, got list"),
        ({"max_model_len": "8G"}, "max_model_len must be a whole number, got '8G'"),
        ({"enforce_eager": 2}, "enforce_eager must be true or false, got 2"),
        ({"gpu_memory_utilization": "most"}, "gpu_memory_utilization must be a number, got 'most'"),
        ({"kv_cache_dtype": 8}, "kv_cache_dtype must be a text, got 8"),
    ],
)
def test_what_cannot_be_read_is_refused(args: dict[str, Any], message: str) -> None:
    outcome = repair(args, SMALL, H200)
    assert (outcome.status, outcome.refusal, outcome.changes) == (RepairStatus.REFUSED, message, ())
    assert outcome.args is args


def test_pins_send_repair_to_the_other_argument() -> None:
    args: KnobValues = {"max_num_seqs": 256, "max_num_batched_tokens": 128}
    assert repair(args, SMALL, H200, pinned=frozenset({"max_num_batched_tokens"})).args["max_num_seqs"] == 128
    both = repair(args, SMALL, H200, pinned=frozenset(args))
    assert both.status is RepairStatus.REFUSED
    assert both.rule == "batch-sequences"
    assert both.refusal.endswith("pinned: max_num_batched_tokens, max_num_seqs")
    split: KnobValues = {"max_num_batched_tokens": 512, "max_model_len": 4096, "enable_chunked_prefill": False}
    batch = frozenset({"max_num_batched_tokens"})
    assert repair(split, SMALL, H200, pinned=batch).args["enable_chunked_prefill"] is True
    rest = frozenset({"max_num_batched_tokens", "enable_chunked_prefill"})
    assert repair(split, SMALL, H200, pinned=rest).args["max_model_len"] == 512
    assert repair(split, SMALL, H200, pinned=rest, workload_max_len=1024).status is RepairStatus.REFUSED
    unknown = repair({"kv_cache_dtype": "int4"}, SMALL, H200, pinned=frozenset({"kv_cache_dtype"}))
    assert unknown.refusal.endswith("pinned: kv_cache_dtype")


def test_less_is_repaired_where_less_is_known() -> None:
    args: KnobValues = {"max_num_seqs": 4096, "block_size": 7, "max_model_len": 10**6, "tensor_parallel_size": 5}
    assert repair(args, None, None).status is RepairStatus.UNCHANGED
    assert repair({"max_num_seqs": 64, "max_num_batched_tokens": 8}, None, None).args["max_num_batched_tokens"] == 64


def test_rules_hold_in_their_versions_only() -> None:
    for version in ((0, 26), (0, 33)):
        assert repair({"quantization": "gguf"}, SMALL, H200, vllm_version=version).status is RepairStatus.UNCHANGED
        assert repair({"max_num_seqs": 0}, SMALL, H200, vllm_version=version).status is RepairStatus.REPAIRED
    assert repair({"quantization": "gguf"}, SMALL, H200, vllm_version=(0, 32, 1)).status is RepairStatus.REPAIRED
    assert Versions((0, 26)).hold(None)


def test_every_rule_has_a_name_and_a_demand() -> None:
    assert len({rule.name for rule in ALL}) == len(ALL)
    assert all(rule.demand and rule.versions.since >= (0, 26) for rule in ALL)
