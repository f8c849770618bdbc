"""What is learned from earlier starts: the error of the estimate, and limits from crashes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from guard_models import H200_141GB, MEASURED, QWEN_SHAPE

from vllm_sloguard.guard import memory
from vllm_sloguard.guard.evidence import Rung
from vllm_sloguard.guard.known_model import KnownModel
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB
from vllm_sloguard.guard.repair import Repair
from vllm_sloguard.guard.start_history import (
    Learned,
    LearnedLimit,
    LimitKind,
    ReportedStart,
    known_args,
    model_key,
    read_history,
    to_json,
)
from vllm_sloguard.knobs import KnobValues

MIB = 2**20
BATCH = {"max_num_batched_tokens": 8192, "max_num_seqs": 256}


def start(args: KnobValues, error_bytes: int, version: str = "") -> ReportedStart:
    """A start that took ``error_bytes`` more than estimated."""
    kv = memory.estimate(QWEN_SHAPE, args, H200_141GB).kv_bytes - error_bytes
    return ReportedStart(args, "cuda", H200_141GB.total_bytes, kv, vllm_version=version)


@pytest.mark.parametrize(("args", "tokens"), MEASURED)
def test_one_start_calibrates_the_estimate_of_an_h200(args: KnobValues, tokens: int) -> None:
    per_token = memory.kv_bytes_per_token(QWEN_SHAPE, args)
    once = Learned((ReportedStart(args, "cuda", H200_141GB.total_bytes, tokens * per_token),))
    calibrated = once.estimate(QWEN_SHAPE, args, H200_141GB)
    assert abs(calibrated.kv_tokens / tokens - 1) < 0.002
    raw = memory.estimate(QWEN_SHAPE, args, H200_141GB)
    assert abs(calibrated.kv_tokens - tokens) <= abs(raw.kv_tokens - tokens)


@pytest.mark.parametrize(("args", "tokens"), MEASURED)
def test_a_start_with_the_defaults_leaves_the_other_estimates_within_one_percent(args: KnobValues, tokens: int) -> None:
    defaults, default_tokens = MEASURED[0]
    per_token = memory.kv_bytes_per_token(QWEN_SHAPE, defaults)
    once = Learned((ReportedStart(defaults, "cuda", H200_141GB.total_bytes, default_tokens * per_token),))
    assert abs(once.estimate(QWEN_SHAPE, args, H200_141GB).kv_tokens / tokens - 1) < 0.01


def correction(learned: Learned, args: KnobValues, machine: Machine = H200_141GB) -> int:
    return (
        learned.estimate(QWEN_SHAPE, args, machine).overhead_bytes
        - memory.estimate(QWEN_SHAPE, args, machine).overhead_bytes
    )


def test_the_error_of_the_same_configuration_is_corrected() -> None:
    assert 0.88 < correction(Learned((start(BATCH, GIB),)), BATCH) / GIB < 0.93
    twice = Learned((start(BATCH, GIB), start(BATCH, GIB)))
    assert 0.94 < correction(twice, BATCH) / GIB < 0.97


def test_the_more_a_configuration_differs_the_less_it_is_corrected() -> None:
    learned = Learned((start(BATCH, GIB),))
    steps: tuple[KnobValues, ...] = ({}, {"max_num_batched_tokens": 16384}, {"max_num_batched_tokens": 65536})
    found = [correction(learned, {**BATCH, **step}, H200_141GB) for step in steps]
    assert found[0] > found[1] > found[2] > 0
    assert correction(learned, BATCH, Machine("cpu", 2**34, 2**34, 0, "")) == 0


@pytest.mark.parametrize(
    "other",
    [
        {"quantization": "fp8"},
        {"dtype": "float16"},
        {"kv_cache_dtype": "fp8"},
        {"enforce_eager": True},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
    ],
    ids=str,
)
def test_a_start_says_nothing_of_other_weights_types_or_layouts(other: KnobValues) -> None:
    learned = Learned((start(BATCH, GIB, "0.26.0"),), vllm_version="0.26.0")
    assert correction(learned, {**BATCH, **other}, H200_141GB) == 0
    assert learned.estimate(QWEN_SHAPE, {**BATCH, **other}, H200_141GB).rung is Rung.FORMULA
    assert learned.estimate(QWEN_SHAPE, BATCH, H200_141GB).rung is Rung.REPORTED
    assert replace(learned, vllm_version="0.32.0").estimate(QWEN_SHAPE, BATCH, H200_141GB).rung is Rung.FORMULA


def test_starts_of_another_version_are_left_out() -> None:
    learned = Learned((start(BATCH, GIB, "0.26.0"), start(BATCH, 2 * GIB, "0.32.0")))
    assert [s.vllm_version for s in learned.of_version("0.32.0").starts] == ["0.32.0"]


def rule(kind: LimitKind, value: int, args: KnobValues, expires_at: float = 100.0) -> LearnedLimit:
    return LearnedLimit(kind, value, args, "seen", 0.0, expires_at)


def test_rules_hold_until_they_expire() -> None:
    rules = (rule(LimitKind.FREE_BYTES, 30 * GIB, {}), rule(LimitKind.FREE_BYTES, 20 * GIB, {}, expires_at=50.0))
    learned = Learned((), (*rules, *(rule(LimitKind.HEADROOM_BYTES, GIB, {}) for _ in range(2))))
    assert learned.limits(QWEN_SHAPE, {}, H200_141GB, 10.0).free_bytes == 20 * GIB
    late = learned.limits(QWEN_SHAPE, {}, H200_141GB, 60.0)
    assert (late.free_bytes, late.headroom_bytes) == (30 * GIB, 2 * GIB)
    assert learned.limits(QWEN_SHAPE, {}, H200_141GB, 100.0).headroom_bytes == 0


def test_a_repairer_repairs_with_all_that_holds_and_was_not_left_out() -> None:
    learned = Learned((start(BATCH, GIB),), (rule(LimitKind.FREE_BYTES, 64 * GIB, {}),), "0.26.0")
    given = {**BATCH, "gpu_memory_utilization": 0.9}

    def repaired(known: Learned, now: float) -> Repair:
        return known.repairer(KnownModel(QWEN_SHAPE), H200_141GB, now, pinned=frozenset(), workload_max_len=None)(given)

    crowded = repaired(learned, 1.0)
    assert [change.name for change in crowded.changes] == ["gpu_memory_utilization"]
    for unlimited in (repaired(learned, 1e9), repaired(learned.without(LimitKind.FREE_BYTES), 1.0)):
        assert unlimited.args == given
        assert unlimited.budget == learned.estimate(QWEN_SHAPE, given, H200_141GB)


def test_a_length_that_did_not_fit_limits_what_has_no_more_room() -> None:
    crashed = {"gpu_memory_utilization": 0.05, "max_model_len": 200_000}
    learned = Learned((), (rule(LimitKind.MAX_MODEL_LEN, 120_000, crashed),))
    for share, expected in ((0.04, 120_000), (0.05, 120_000), (0.5, None)):
        assert learned.limits(QWEN_SHAPE, {"gpu_memory_utilization": share}, H200_141GB, 1.0).max_model_len == expected
    assert learned.limits(None, {**crashed, "max_model_len": 9}, H200_141GB, 1.0).max_model_len == 120_000
    assert learned.limits(None, {}, H200_141GB, 1.0).max_model_len is None


def test_the_file_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    assert read_history(path, "some/model") == Learned()
    rules = (rule(LimitKind.HEADROOM_BYTES, GIB, {"enforce_eager": True}),)
    learned = Learned((start(BATCH, MIB, "0.32.0"),), rules, "0.32.0", "some/model")
    path.write_text(to_json(learned), encoding="utf-8")
    assert read_history(path, "some/model") == learned
    assert read_history(path, "another/model") == Learned()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"starts": [{"args": {}}]}', '{"rules": [{"kind": "x"}]}', "\0"])
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "learned.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^.*learned\.json: damaged: [^\n]+$"):
        read_history(path, "some/model")


def test_only_what_matters_is_kept_of_the_arguments() -> None:
    given = {"max_num_seqs": 8, "served_model_name": ["a"], "api_key": "secret", "dtype": "bfloat16"}
    assert known_args(given) == {"max_num_seqs": 8, "dtype": "bfloat16"}
    assert known_args({"max_model_len": "8k", "max_num_batched_tokens": "2K"}) == {
        "max_model_len": 8000,
        "max_num_batched_tokens": 2048,
    }
    assert known_args({"max_num_seqs": "many"}) is None


def test_what_another_process_took_meanwhile_is_no_error_of_the_estimate() -> None:
    wild = start(BATCH, 50 * GIB)
    assert wild.error_bytes(KnownModel(QWEN_SHAPE)) is None
    assert correction(Learned((wild,)), BATCH) == 0
    # Of what is plausible, half of the starts must agree.
    assert correction(Learned((start(BATCH, GIB), start(BATCH, 0), start(BATCH, 0))), BATCH) == 0


def test_a_local_model_is_known_by_its_config(tmp_path: Path) -> None:
    assert model_key("some/model") == "some/model"
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"hidden_size": 64}))
    first = model_key(str(tmp_path))
    config.write_text(json.dumps({"hidden_size": 128}))
    assert first.startswith(str(tmp_path))
    assert model_key(str(tmp_path)) != first
