"""The KV budget against what vLLM reported, and its formulas against numbers worked out by hand."""

from typing import Any

import pytest

from vllm_sloguard.knobs import Config
from vllm_sloguard.machine import Machine
from vllm_sloguard.memory import GIB, estimate, kv_bytes_per_token, request_tokens, weights_bytes
from vllm_sloguard.model_shape import from_config

from .models import DEEPSEEK, QWEN

QWEN_SHAPE = from_config({**QWEN, "max_position_embeddings": 8192})
H200 = Machine("cuda", int(139.81 * GIB), int(139.2 * GIB), 1, "NVML: NVIDIA H200")
CPU = Machine("cpu", 16 * GIB, 14 * GIB, 0, "meminfo")


# What vLLM 0.26 reported with Qwen2-1.5B's shape.
MEASURED: list[tuple[Config, int]] = [
    ({}, 4_676_000),
    ({"enforce_eager": True}, 4_675_120),
    ({"gpu_memory_utilization": 0.25}, 1_167_392),
    ({"gpu_memory_utilization": 0.25, "kv_cache_dtype": "fp8"}, 2_334_800),
    ({"gpu_memory_utilization": 0.25, "quantization": "fp8"}, 1_213_632),
    ({"gpu_memory_utilization": 0.25, "dtype": "float32"}, 520_576),
    ({"gpu_memory_utilization": 0.27, "max_num_batched_tokens": 131_072}, 989_040),
    ({"gpu_memory_utilization": 0.05}, 121_184),
    ({"max_num_seqs": 64, "max_num_batched_tokens": 4096}, 4_678_016),
]


@pytest.mark.parametrize(("args", "tokens"), MEASURED)
def test_kv_tokens_that_vllm_reported_on_an_h200(args: Config, tokens: int) -> None:
    budget = estimate(QWEN_SHAPE, args, H200)
    assert budget.starts, budget.reason
    assert abs(budget.kv_tokens / tokens - 1) < 0.005


@pytest.mark.parametrize(
    ("args", "available_gib"),
    [
        ({"gpu_memory_utilization": 0.02}, -1.02),
        ({"gpu_memory_utilization": 0.03, "max_num_batched_tokens": 32_768, "enforce_eager": True}, -1.09),
    ],
)
def test_memory_that_vllm_lacked_on_an_h200(args: Config, available_gib: float) -> None:
    budget = estimate(QWEN_SHAPE, args, H200)
    assert not budget.starts
    assert "none is left for KV" in budget.reason
    assert abs(budget.kv_bytes / GIB - available_gib) < 0.06


def test_another_tenant_takes_the_share() -> None:
    crowded = Machine("cuda", H200.total_bytes, int(38.69 * GIB), 1, "NVML")
    for args in ({"gpu_memory_utilization": 0.95}, {"kv_cache_memory_bytes": 10 * GIB}):
        budget = estimate(QWEN_SHAPE, args, crowded)
        assert not budget.starts
        assert "38.69 GiB that are free" in budget.reason


def test_stated_kv_replaces_the_share_on_the_cpu() -> None:
    assert not estimate(QWEN_SHAPE, {}, CPU).starts
    stated = estimate(QWEN_SHAPE, {"kv_cache_memory_bytes": 4 * GIB}, CPU)
    assert stated.starts
    assert stated.kv_tokens == 4 * GIB // (28_672 * 128) * 128
    assert not estimate(QWEN_SHAPE, {"kv_cache_memory_bytes": 12 * GIB}, CPU).starts


def test_tiny_cpu_model_as_vllm_reported_it() -> None:
    fields = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
    shape = from_config({**QWEN, **fields, "num_attention_heads": 4, "max_position_embeddings": 2048})
    # vLLM 0.32: "CPU KV cache size: 652,880 tokens" at 0.15 of 6.59 GiB, of which it found 0.31 GiB for KV.
    args: Config = {"gpu_memory_utilization": 0.15, "block_size": 16, "max_model_len": 1024}
    budget = estimate(shape, args, Machine("cpu", 7_073_902_592, 6 * GIB, 0, "cgroup"))
    assert budget.kv_bytes_per_token == 512
    assert abs(budget.kv_tokens / 652_880 - 1) < 0.05


@pytest.mark.parametrize(
    ("fields", "args", "expected"),
    [
        ({}, {}, 28 * 2 * 2 * 128 * 2),
        ({}, {"tensor_parallel_size": 2}, 28 * 2 * 1 * 128 * 2),
        ({}, {"tensor_parallel_size": 4}, 28 * 2 * 1 * 128 * 2),
        ({}, {"pipeline_parallel_size": 3}, 10 * 2 * 2 * 128 * 2),
        ({}, {"kv_cache_dtype": "fp8_e5m2"}, 28 * 2 * 2 * 128),
        ({}, {"kv_cache_dtype": "bfloat16", "dtype": "float32"}, 28 * 2 * 2 * 128 * 2),
        ({"torch_dtype": "float32"}, {}, 28 * 2 * 2 * 128 * 2),
        (DEEPSEEK, {}, 28 * 576 * 2),
        (DEEPSEEK, {"tensor_parallel_size": 4}, 28 * 576 * 2),
        (DEEPSEEK, {"kv_cache_dtype": "fp8_ds_mla"}, 28 * 656),
    ],
)
def test_bytes_of_a_token(fields: dict[str, Any], args: Config, expected: int) -> None:
    assert kv_bytes_per_token(from_config({**QWEN, **fields}), args) == expected


def test_weights() -> None:
    attention, mlp, head = 1536 * 128 * (2 * 12 + 2 * 2), 3 * 1536 * 8960, 151_936 * 1536
    assert weights_bytes(QWEN_SHAPE, {}) == 2 * (28 * (attention + mlp) + head)
    untied = from_config({**QWEN, "tie_word_embeddings": False})
    assert weights_bytes(untied, {}) == 2 * (28 * (attention + mlp) + 2 * head)
    halves = weights_bytes(QWEN_SHAPE, {"tensor_parallel_size": 2})
    assert halves == weights_bytes(QWEN_SHAPE, {}) // 2
    assert weights_bytes(QWEN_SHAPE, {"quantization": "fp8"}) == 28 * (attention + mlp) + 2 * head


def test_weights_of_experts() -> None:
    shape = from_config(DEEPSEEK)
    attention = 1536 * 12 * 192 + 1536 * 576 + 512 * 12 * 256 + 12 * 128 * 1536
    sparse = 3 * 1536 * (64 * 1408 + 2816) + 1536 * 64
    parameters = 28 * attention + 3 * 1536 * 8960 + 27 * sparse + 151_936 * 1536
    assert weights_bytes(shape, {}) == 2 * parameters


def test_a_window_bounds_a_request() -> None:
    shape = from_config({**QWEN, "use_sliding_window": True, "sliding_window": 4096})
    args: Config = {"max_num_batched_tokens": 2048, "block_size": 16}
    assert request_tokens(shape, args, H200) == (-(-(4095 + 2048) // 16) + 2) * 16
    assert request_tokens(QWEN_SHAPE, {**args, "max_model_len": 1000}, H200) == 1008 + 16
    assert request_tokens(QWEN_SHAPE, {**args, "max_model_len": -1}, H200) is None
