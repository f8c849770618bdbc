"""Each kind of crash has an example that is classified as it says, and its advice has the values of the text."""

import pytest

from vllm_sloguard.crash import Category, classify
from vllm_sloguard.crash.advice import advice_for
from vllm_sloguard.crash.crash_rules import CRASH_RULES, CrashRule


@pytest.mark.parametrize("rule", CRASH_RULES, ids=lambda rule: rule.anchor)
def test_examples(rule: CrashRule) -> None:
    exit_code = -9 if rule.title == "Killed" else None
    phase = "serving" if rule.category is Category.ENGINE_DEATH else "starting"
    crash = classify("" if exit_code else rule.example, phase=phase, exit_code=exit_code)
    assert crash.category is rule.category
    advice = advice_for(crash)
    assert advice.anchor == rule.anchor
    assert advice.meaning
    assert advice.changes


@pytest.mark.parametrize(
    ("title", "change"),
    [
        ("KV cache too small for one request", "max_model_len: at most 1792"),
        ("GPU memory taken by others", "gpu_memory_utilization: at most 0.27 (38.69 of 139.8 GiB were free)"),
        ("Heads not divisible by the tensor-parallel size", "tensor_parallel_size: 2, or another divisor of 64"),
        ("More GPUs requested than present", "tensor_parallel_size: at most 1"),
        ("Fewer batched tokens than sequences", "max_num_batched_tokens: at least 16"),
        ("Fewer batched tokens than max_model_len", "max_num_batched_tokens: at least 8192"),
        ("max_model_len above the model's", "max_model_len: at most 2048"),
        ("Unknown argument", "remove or correct: --max-num-seq-typo"),
    ],
)
def test_values_come_from_the_text(title: str, change: str) -> None:
    rule = next(rule for rule in CRASH_RULES if rule.title == title)
    assert advice_for(classify(rule.example, phase="starting", exit_code=None)).changes[0] == change


@pytest.mark.parametrize("category", Category)
def test_every_category_has_advice_for_what_no_rule_names(category: Category) -> None:
    lines = {
        Category.OUT_OF_MEMORY: "Failed to load model - not enough memory: std::bad_alloc",
        Category.CUDA_ERROR: "RuntimeError: CUDA error: an unknown one",
        Category.STARTUP_FAILURE: "KeyError: 'x'",
        Category.TIMEOUT: "TimeoutError: RPC call to execute_model timed out.",
        Category.ENGINE_DEATH: "AssertionError",
    }
    phase = "serving" if category is Category.ENGINE_DEATH else "starting"
    crash = classify(lines[category], phase=phase, exit_code=None)
    assert crash.category is category
    assert advice_for(crash).changes
