"""Memory repairs: they use more memory before they reduce anything that users notice."""

import re

import pytest
from guard_models import CONSUMER, CPU, CROWDED, H200, LARGE, QWEN, SMALL, with_checkpoint

from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB
from vllm_sloguard.guard.model_shape import from_config
from vllm_sloguard.guard.repair import Limits, RepairStatus, repair
from vllm_sloguard.knobs import KnobValues

SHARE = frozenset({"gpu_memory_utilization"})


def test_a_share_is_lowered_to_what_is_free() -> None:
    outcome = repair({}, SMALL, CROWDED)
    assert outcome.status is RepairStatus.REPAIRED
    assert outcome.args == {"gpu_memory_utilization": 0.266}
    assert (
        outcome.changes[0].reason == "requested 128.63 GiB and 0.73 GiB beside them exceed the 38.69 GiB that are free"
    )
    # On CUDA a stated cache does not lift the check; on the CPU it does.
    assert "gpu_memory_utilization" in repair({"kv_cache_memory_bytes": GIB}, SMALL, CROWDED).args
    busy = Machine("cpu", 16 * GIB, 8 * GIB, 0, "meminfo")
    assert repair({"kv_cache_memory_bytes": GIB}, SMALL, busy).status is RepairStatus.UNCHANGED


def test_a_stated_cache_is_lowered_to_what_is_free() -> None:
    outcome = repair({"kv_cache_memory_bytes": 64 * GIB}, SMALL, CPU)
    assert outcome.status is RepairStatus.REPAIRED
    assert 8 * GIB < int(outcome.args["kv_cache_memory_bytes"]) < 15 * GIB


def test_a_share_too_small_for_the_model_is_raised_to_what_it_needs() -> None:
    outcome = repair({"gpu_memory_utilization": 0.25, "max_num_batched_tokens": 2048}, LARGE, CONSUMER)
    assert outcome.status is RepairStatus.REPAIRED
    assert [change.name for change in outcome.changes] == ["gpu_memory_utilization"]
    share = float(outcome.args["gpu_memory_utilization"])
    assert outcome.budget is not None
    assert outcome.budget.starts
    less = repair({**outcome.args, "gpu_memory_utilization": share - 0.001}, LARGE, CONSUMER, pinned=SHARE)
    assert less.budget is not None
    assert less.budget.kv_tokens < outcome.budget.kv_tokens


def test_a_length_is_lowered_to_what_fits_where_no_more_memory_may_be_taken() -> None:
    args: KnobValues = {"gpu_memory_utilization": 0.72, "max_num_batched_tokens": 2048}
    pinned = SHARE | {"max_num_batched_tokens"}
    outcome = repair(args, LARGE, CONSUMER, pinned=pinned)
    assert outcome.status is RepairStatus.REPAIRED
    assert int(outcome.args["max_model_len"]) < 32768
    assert outcome.budget is not None
    assert outcome.budget.starts
    more = {**outcome.args, "max_model_len": int(outcome.args["max_model_len"]) + 16}
    assert repair(more, LARGE, CONSUMER, pinned=pinned | {"max_model_len"}).budget != outcome.budget
    needed = repair(args, LARGE, CONSUMER, pinned=pinned, workload_max_len=32768, estimate=with_checkpoint)
    assert needed.status is RepairStatus.REFUSED
    assert "the workload needs 32768" in needed.refusal


@pytest.mark.parametrize(("kv_bytes", "block", "longest"), [(2**20, 32, 2016), (1_000_000, 128, 1792)])
def test_the_length_that_vllm_itself_proposes(kv_bytes: int, block: int, longest: int) -> None:
    """From two failed starts of vLLM 0.32: "the estimated maximum model length is N"."""
    fields = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
    tiny = from_config({**QWEN, **fields, "num_attention_heads": 4})
    args: KnobValues = {"kv_cache_memory_bytes": kv_bytes, "block_size": block, "max_model_len": 4096}
    pinned = frozenset({"kv_cache_memory_bytes", "block_size"})
    assert repair(args, tiny, CPU, pinned=pinned).args == {**args, "max_model_len": longest}
    grown = repair(args, tiny, CPU, pinned=frozenset({"block_size"}))
    assert int(grown.args["kv_cache_memory_bytes"]) == 512 * (4096 + block)


def test_a_step_is_made_smaller_where_its_activations_are_too_large() -> None:
    args: KnobValues = {"max_num_batched_tokens": 200_000, "max_model_len": 8192}
    pinned = SHARE | {"max_model_len"}
    outcome = repair(args, LARGE, CONSUMER, pinned=pinned, estimate=with_checkpoint)
    assert {change.name for change in outcome.changes} == {"max_num_batched_tokens"}
    batch = int(outcome.args["max_num_batched_tokens"])
    assert 8192 < batch < 200_000
    larger = {**args, "max_num_batched_tokens": batch + 8192}
    more = repair(larger, LARGE, CONSUMER, pinned=frozenset({*SHARE, *args}), estimate=with_checkpoint)
    assert more.status is RepairStatus.REFUSED


def test_a_refusal_does_the_arithmetic() -> None:
    args: KnobValues = {"gpu_memory_utilization": 0.25}
    outcome = repair(args, LARGE, CONSUMER, pinned=SHARE, estimate=with_checkpoint)
    assert outcome.status is RepairStatus.REFUSED
    assert outcome.args is args
    assert outcome.rule == "some-kv"
    parts, total = outcome.refusal.split(" exceed 0.25 × 24.00 GiB; needs utilization ≥ ")  # noqa: RUF001
    needed, pinned = total.split("; ")
    fixed = sum(float(size) for size in re.findall(r"([\d.]+) GiB", parts))
    assert parts.startswith("weights 14.96 GiB + activations ")
    assert fixed > 0.25 * 24
    assert (float(needed) - 0.001) * 24 < fixed + 0.02 <= float(needed) * 24 + 0.04
    assert pinned == "pinned: gpu_memory_utilization"
    small = Machine("cuda", 12 * GIB, 12 * GIB, 1, "NVML")
    beyond = repair({}, LARGE, small, estimate=with_checkpoint)
    assert beyond.status is RepairStatus.REFUSED
    assert re.search(r"needs utilization ≥ 1\.\d\d\d$", beyond.refusal)


def test_formulas_alone_refuse_nothing() -> None:
    """Formulas prove nothing: the configuration passes, with a warning that names the source of the estimate."""
    args: KnobValues = {"gpu_memory_utilization": 0.25}
    outcome = repair(args, LARGE, CONSUMER, pinned=SHARE)
    assert outcome.status is RepairStatus.UNCHANGED
    assert outcome.args is args
    assert outcome.warning.startswith("it may not start: weights and activations take 16.22 of 6.00 GiB")
    assert "the estimate is based on formulas only, and may be off by 0.50 GiB" in outcome.warning


def test_layers_that_the_formulas_do_not_know_change_nothing() -> None:
    hybrid = from_config({**QWEN, "model_type": "qwen3_next", "full_attention_interval": 4})
    args: KnobValues = {"gpu_memory_utilization": 0.05, "max_model_len": 32768}
    outcome = repair(args, hybrid, CONSUMER)
    assert outcome.status is RepairStatus.UNCHANGED
    assert "which do not cover all of its layers" in outcome.warning
    # Vast memory is enough for it whatever they keep.
    assert repair({"max_model_len": 4096}, hybrid, H200).warning == ""


def test_an_unknown_model_is_a_warning() -> None:
    outcome = repair({}, None, CONSUMER, unknown="model config: hidden_size is missing")
    assert outcome.status is RepairStatus.UNCHANGED
    assert outcome.warning == "memory is not checked: model config: hidden_size is missing"


def test_a_change_that_a_later_one_makes_needless_is_undone() -> None:
    # Raised to hold a prompt of 32768 tokens at first; the cache then allows fewer.
    args: KnobValues = {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 2**25,
    }
    outcome = repair(args, SMALL, H200, pinned=frozenset({"kv_cache_memory_bytes"}))
    length = int(outcome.args["max_model_len"])
    assert {change.name for change in outcome.changes} == {"max_model_len"}
    assert 0 < length <= 2048
    # And only to what the shorter length needs, where it is needed after all.
    least = repair({**args, "max_num_batched_tokens": 8}, SMALL, H200, pinned=frozenset({"kv_cache_memory_bytes"}))
    assert least.args["max_num_batched_tokens"] == least.args["max_model_len"] == length


def test_learned_limits() -> None:
    length = repair({}, SMALL, H200, limits=Limits(max_model_len=4096))
    assert length.args == {"max_model_len": 4096}
    assert length.changes[0].reason == "max_model_len 32768 is above the 4096 that vLLM said would fit here (learned)"
    assert (
        repair({}, SMALL, H200, limits=Limits(max_model_len=4096), workload_max_len=8192).status is RepairStatus.REFUSED
    )
    assert (
        repair({"max_model_len": -1}, SMALL, H200, limits=Limits(max_model_len=4096)).status is RepairStatus.UNCHANGED
    )

    taken = repair({}, SMALL, H200, limits=Limits(free_bytes=64 * GIB))
    assert float(taken.args["gpu_memory_utilization"]) * H200.total_bytes < 64 * GIB
    assert "exceed the 64.00 GiB that were free at an earlier start (learned)" in taken.changes[0].reason

    kept = repair({}, SMALL, H200, limits=Limits(headroom_bytes=16 * GIB))
    assert float(kept.args["gpu_memory_utilization"]) * H200.total_bytes < H200.free_bytes - 16 * GIB
    assert "less 16.00 GiB kept since an out-of-memory under load (learned)" in kept.changes[0].reason
    cache = repair({"kv_cache_memory_bytes": 10 * GIB}, SMALL, CPU, limits=Limits(headroom_bytes=8 * GIB))
    assert int(cache.args["kv_cache_memory_bytes"]) < 7 * GIB
