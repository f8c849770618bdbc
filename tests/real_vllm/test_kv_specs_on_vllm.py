"""The memory model against vLLM's own KV-cache specs, blocks, capacities and parameter counts."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from guard_models import FAMILIES, LLAMA

from vllm_sloguard.guard.kv_cache import kv_bytes_per_token, layout
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import estimate
from vllm_sloguard.guard.model_shape import ModelShape, from_config
from vllm_sloguard.guard.weights import embedding_bytes, stages, weights_bytes
from vllm_sloguard.knobs import KnobValues

pytestmark = pytest.mark.timeout(900)

SCRIPT = Path(__file__).parents[1] / "support" / "vllm_specs.py"
INT4: dict[str, Any] = {"bits": 4, "group_size": 128}
INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {**INT8, "strategy": "channel", "dynamic": False},
    "input_activations": {**INT8, "strategy": "token", "dynamic": True},
}
QUANTIZED: dict[str, dict[str, Any]] = {
    "llama_awq": {"quant_method": "awq", "zero_point": True, "version": "gemm", **INT4},
    "llama_gptq": {"quant_method": "gptq", "sym": True, "desc_act": False, **INT4},
    "llama_w8a8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": W8A8},
        "ignore": ["lm_head"],
    },
}
# The CPU build has no kernels for gpt-oss's own quantization: its experts are built in full width.
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {k: v for k, v in config.items() if k != "quantization_config"} for name, config in FAMILIES.items()},
    **{name: {**LLAMA, "torch_dtype": "float16", "quantization_config": found} for name, found in QUANTIZED.items()},
}
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2)]
KINDS = ["auto", "fp8"]
# Arguments and KV bytes: lengths of whole blocks and not, one left to vLLM, too little memory for most
# models, and sliding windows that are ignored.
BUDGETS: list[tuple[dict[str, Any], int]] = [
    ({"max_model_len": 2048, "max_num_batched_tokens": 512}, 2**30),
    ({"max_model_len": 3000, "max_num_batched_tokens": 2048}, 2**32),
    ({"max_model_len": -1, "max_num_batched_tokens": 2048}, 2**28),
    ({"max_model_len": 4000, "max_num_batched_tokens": 2048}, 2**27),
    ({"max_model_len": 4000, "disable_hybrid_kv_cache_manager": True}, 2**31),
]
CPU = Machine("cpu", 2**42, 2**42, 0, "large enough")
CASES = [(name, kind, tp, pp) for name in CONFIGS for kind in KINDS for tp, pp in LAYOUTS]
# Over four ranks the experts of gpt-oss have a width for which the CPU build has no kernel.
BUILT = [case for case in CASES if case[::2] != ("gpt_oss", 4)]
Case = tuple[str, str, int, int]
Answers = dict[Case, dict[str, Any]]


@pytest.fixture(scope="module")
def vllm_answers() -> Answers:
    """vLLM's own numbers by model, KV dtype, TP and PP."""
    request = {"models": CONFIGS, "layouts": LAYOUTS, "kinds": KINDS, "budgets": BUDGETS}
    ended = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    answers = json.loads(ended.stdout[ended.stdout.index("[{") :])
    return {(a["model"], a["kind"], a["tp"], a["pp"]): a for a in answers}


def ours(name: str, kind: str, tp: int, pp: int) -> tuple[ModelShape, KnobValues]:
    return from_config(CONFIGS[name]), {
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
        "kv_cache_dtype": kind,
    }


def test_vllm_builds_every_model_that_it_has_kernels_for(vllm_answers: Answers) -> None:
    assert set(vllm_answers) == set(CASES)
    assert {case for case, answer in vllm_answers.items() if not answer["refused"]} == set(BUILT)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kv_bytes_per_token_match_vllms_counts(vllm_answers: Answers, case: Case) -> None:
    shape, args = ours(*case)
    answer = vllm_answers[case]
    width = 1 if case[1] == "fp8" else 2
    each = answer["kv_heads"] * answer["head_size"] * width * (1 if answer["mla"] else 2)
    # The configuration is that of the first stage.
    assert len(stages(shape, args)[0]) == answer["layers"]
    assert kv_bytes_per_token(shape, args) == each * max(len(stage) for stage in stages(shape, args))
    assert layout(shape, args, CPU).groups[0].block_size == answer["block_size"]
    assert shape.max_model_len == answer["max_model_len"]


@pytest.mark.parametrize("case", BUILT, ids=str)
def test_kv_bytes_per_token_match_vllms_specs(vllm_answers: Answers, case: Case) -> None:
    shape, args = ours(*case)
    built = vllm_answers[case]["stages"]
    assert [len(stage) for stage in stages(shape, args)] == [stage["layers"] for stage in built]
    assert kv_bytes_per_token(shape, args) == max(stage["bytes_per_token"] for stage in built)


@pytest.mark.parametrize("budget", range(len(BUDGETS)))
@pytest.mark.parametrize("case", BUILT, ids=str)
def test_blocks_and_capacity_match_vllms(vllm_answers: Answers, case: Case, budget: int) -> None:
    """Groups, padding and windows included: what vLLM would print as KV cache size and maximum concurrency."""
    shape, known = ours(*case)
    asked, kv_bytes = BUDGETS[budget]
    args: KnobValues = {**known, **asked, "kv_cache_memory_bytes": kv_bytes}
    answer = vllm_answers[case]["budgets"][budget]
    mine = estimate(shape, args, CPU)
    if "error" in answer:
        assert "is needed, which is larger than the available KV cache" in answer["error"]
        assert not mine.starts
        found = re.search(r"estimated maximum model length is (\d+)", answer["error"])
        cache = layout(shape, args, CPU)
        longest = cache.longest_request(cache.blocks(kv_bytes) - 1, asked["max_model_len"])
        assert longest == (int(found[1]) if found else 0)
        return
    cache = layout(shape, args, CPU)
    assert mine.starts, mine.reason
    assert cache.blocks(kv_bytes) == answer["blocks"]
    assert len(cache.groups) == answer["groups"]
    assert mine.kv_tokens == answer["tokens"]
    assert mine.concurrency == pytest.approx(answer["times"])


@pytest.mark.parametrize("case", [case for case in BUILT if case[1] == "auto"], ids=str)
def test_weights_match_vllms(vllm_answers: Answers, case: Case) -> None:
    shape, args = ours(*case)
    for stage, answer in zip(stages(shape, args), vllm_answers[case]["stages"], strict=True):
        embeddings = answer["embeddings"] // embedding_bytes(shape, args)
        assert embeddings * embedding_bytes(shape, args) == answer["embeddings"]
        assert weights_bytes(shape, args, stage) == pytest.approx(answer["weights"], rel=0.01)
        print(f"{case}: {weights_bytes(shape, args, stage) / answer['weights'] - 1:+.3%}")
