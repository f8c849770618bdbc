"""Properties of repair for any input."""

from collections.abc import Mapping
from typing import Any

from guard_models import CONSUMER, CPU, CROWDED, DEEPSEEK, H200, LARGE, QWEN, SMALL, WINDOWED, with_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sloguard.guard.evidence import Rung
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB, estimate
from vllm_sloguard.guard.model_shape import ModelShape, from_config
from vllm_sloguard.guard.repair import TUNED, Limits, Repair, RepairStatus, repair
from vllm_sloguard.guard.rules import ALL
from vllm_sloguard.guard.rules.arguments import typed_arguments

ARGS: dict[str, st.SearchStrategy[Any]] = {
    "max_num_seqs": st.integers(-1, 20_000),
    "max_num_batched_tokens": st.integers(-1, 200_000),
    "max_model_len": st.integers(-2, 70_000),
    "enable_chunked_prefill": st.booleans(),
    "enforce_eager": st.booleans(),
    "block_size": st.integers(-1, 300) | st.just(10**9),
    "gpu_memory_utilization": st.floats(-0.1, 1.2) | st.just(float("nan")),
    "kv_cache_memory_bytes": st.integers(-1, 2**40),
    "kv_cache_dtype": st.sampled_from(["auto", "fp8", "nvfp4", "int4"]),
    "dtype": st.sampled_from(["auto", "float32", "half", "fp16"]),
    "quantization": st.sampled_from(["fp8", "awq", "fbgemm_fp8", "gguf"]),
    "long_prefill_token_threshold": st.integers(-1, 70_000),
    "stream_interval": st.integers(-1, 8),
    "tensor_parallel_size": st.integers(0, 14),
    "pipeline_parallel_size": st.integers(0, 4),
}
HYBRID = from_config({**QWEN, "model_type": "qwen3_next", "full_attention_interval": 4})
# Anything that YAML, JSON or Python may hold.
ANYTHING: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -(2**63), 10**30, 10**400, -(10**400), 10**5000, 0, -0.0, 1e308])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["8", " 16 ", "1_024", "64.0", "true", "off", "auto", "FP8", "9" * 5000, "nan", "\ud800"])
    | st.lists(st.integers(), max_size=2)
    | st.just([10**5000])
)
WIDE = {name: drawn | ANYTHING for name, drawn in ARGS.items()}
CASES = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([None, SMALL, LARGE, WINDOWED, from_config(DEEPSEEK), HYBRID]),
        "machine": st.sampled_from([None, H200, CROWDED, CONSUMER, CPU]),
        "pinned": st.frozensets(st.sampled_from(sorted(ARGS)), max_size=3),
        "workload_max_len": st.none() | st.integers(1, 40_000),
        "limits": st.sampled_from(
            [Limits(), Limits(max_model_len=5000), Limits(free_bytes=20 * GIB, headroom_bytes=2 * GIB)]
        ),
        "vllm_version": st.sampled_from([None, (0, 26), (0, 32)]),
        "estimate": st.sampled_from([estimate, with_checkpoint]),
    }
)


@settings(max_examples=600)
@given(args=st.fixed_dictionaries({}, optional=ARGS), case=CASES)
def test_of_values_of_their_types(args: dict[str, Any], case: dict[str, Any]) -> None:
    check(args, case)


@settings(max_examples=600)
@given(
    args=st.fixed_dictionaries({}, optional={**WIDE, "enable_prefix_caching": ANYTHING, "another": ANYTHING}),
    case=CASES,
)
def test_of_anything(args: dict[str, Any], case: dict[str, Any]) -> None:
    check(args, case)


def check(args: dict[str, Any], case: dict[str, Any]) -> None:
    shape: ModelShape | None = case["shape"]
    machine: Machine | None = case["machine"]
    before_all = dict(args)
    first = repair(args, **case)
    assert_same(args, before_all)
    again = repair(dict(args), **case)
    assert (again.status, again.refusal, again.rule) == (first.status, first.refusal, first.rule)
    assert_same(again.args, first.args)
    assert repair(dict(reversed(args.items())), **case).status is first.status
    assert "contradict" not in first.refusal
    for text in (first.refusal, *(change.reason for change in first.changes)):
        assert len(text.splitlines()) <= 1
        assert len(text) < 2000
    if first.status is RepairStatus.REFUSED:
        assert first.args is args
        assert first.refusal
        assert first.rule in {rule.name for rule in ALL}
        assert first.changes == ()
        assert_proven(first, machine, case["limits"])
        return
    twice = repair(first.args, **case)
    assert twice.status is RepairStatus.UNCHANGED
    assert twice.args is first.args
    if first.status is RepairStatus.UNCHANGED:
        assert first.args is args
    assert all(first.args.get(name) is args.get(name) for name in case["pinned"])
    before, after = typed_arguments(args).get("max_model_len"), typed_arguments(first.args).get("max_model_len")
    if after is not None and after != before:
        assert int(after) >= (case["workload_max_len"] or 1)
    changed = {change.name for change in first.changes}
    assert_same(_but(first.args, changed), _but(args, changed))
    assert changed <= set(TUNED)
    if shape is not None and machine is not None:
        assert first.budget == case["estimate"](shape, typed_arguments(first.args), machine)


def assert_proven(refused: Repair, machine: Machine | None, limits: Limits) -> None:
    """Only a reliable estimate, short by more than its error, leads to a refusal for memory."""
    budget = refused.budget
    if refused.rule not in {"some-kv", "one-request"} or budget is None or machine is None:
        return
    assert budget.rung <= Rung.CHECKPOINT
    if budget.requested_bytes <= machine.free_bytes and limits == Limits():
        assert budget.kv_bytes + budget.margin_bytes < budget.request_bytes


def _but(args: Mapping[str, Any], changed: set[str]) -> dict[str, Any]:
    """The unchanged arguments; None counts as absent."""
    return {name: value for name, value in args.items() if name not in changed and value is not None}


def assert_same(one: Any, other: Any) -> None:
    """Equality in which NaN equals itself."""
    assert one.keys() == other.keys()
    assert all(one[name] is other[name] or one[name] == other[name] for name in one)
