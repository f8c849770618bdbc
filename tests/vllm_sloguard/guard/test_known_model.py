"""The ladder of evidence: checkpoint headers, cached builds by vLLM's own classes, and their effect on estimates."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from guard_models import H200, LLAMA, QWEN

from vllm_sloguard.guard.built_model import (
    BuiltGroup,
    BuiltModel,
    BuiltStage,
    GroupKind,
    built_model_fields,
    read_built_model,
)
from vllm_sloguard.guard.checkpoint import checkpoint_bytes
from vllm_sloguard.guard.evidence import ModelEvidence, Rung
from vllm_sloguard.guard.known_model import CachedBuilds, known_model, local_folder, structural
from vllm_sloguard.guard.memory import GIB, estimate
from vllm_sloguard.guard.model_shape import from_config
from vllm_sloguard.guard.start_history import Learned
from vllm_sloguard.knobs import KnobValues

# Three of four layers keep a state of one block, the fourth keeps keys and values.
HYBRID = BuiltModel(
    (BuiltStage(GIB, 2**27, 2**20, 2**10),),
    (BuiltGroup(GroupKind.STATE, 1024, 1), BuiltGroup(GroupKind.FULL, 1024)),
    "cuda",
    32768,
    1536,
    151936,
    1024,
)


@dataclass
class Answers:
    """A stand-in for vLLM that always gives the same answer, and records the questions."""

    answer: BuiltModel | None
    asked: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def built(self, folder: Path, args: Mapping[str, Any]) -> BuiltModel | None:
        self.asked.append(dict(args))
        return self.answer


def write_model(folder: Path, config: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_safetensors(path: Path, *sizes: int) -> None:
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    header: dict[str, Any] = {
        f"t{number}": {"dtype": "U8", "shape": [size], "data_offsets": [end - size, end]}
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
    }
    content = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(ends[-1]))


def test_a_checkpoint_is_as_large_as_its_headers_say(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model-1.safetensors", 100, 20)
    write_safetensors(tmp_path / "model-2.safetensors", 3)
    write_safetensors(tmp_path / "consolidated.safetensors", 123)
    assert checkpoint_bytes(tmp_path) == 123
    index = {"metadata": {"total_size": 7}, "weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_bytes(tmp_path) == 120
    index["weight_map"] = {"a": "not-here.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_bytes(tmp_path) == 7


def test_a_gguf_file_is_as_large_as_its_tensors(tmp_path: Path) -> None:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    values = text(b"name") + struct.pack("<I", 8) + text(b"x") + text(b"list") + struct.pack("<IIQ", 9, 8, 2)
    values += text(b"one") + text(b"two") + text(b"layers") + struct.pack("<II", 4, 32)
    # 256 by 8 weights of 4.5 bits (Q4_K), and 16 of 32 bits.
    tensors = text(b"a") + struct.pack("<IQQIQ", 2, 256, 8, 12, 0) + text(b"b") + struct.pack("<IQIQ", 1, 16, 0, 1152)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2, 3) + values + tensors)
    assert checkpoint_bytes(path) == 8 * 144 + 64


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 64, (10).to_bytes(8, "little") + b"{}" + b" " * 8, b"{}"])
def test_a_damaged_checkpoint_says_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + content)
    assert checkpoint_bytes(tmp_path) is None
    assert checkpoint_bytes(tmp_path / "model.gguf") is None


def test_stored_answers_are_for_one_configuration_one_version_and_these_arguments(tmp_path: Path) -> None:
    model, cache = write_model(tmp_path / "model", QWEN), CachedBuilds("0.32.0", tmp_path / "cache")
    assert cache.built(model, {}) is None
    cache.keep(model, {}, HYBRID)
    assert cache.built(model, {}) == HYBRID
    assert cache.built(model, {"tensor_parallel_size": 2}) is None
    assert CachedBuilds("0.33.0", tmp_path / "cache").built(model, {}) is None
    write_model(model, LLAMA)
    assert cache.built(model, {}) is None
    cache.path(model, {}).write_text("{")
    assert cache.built(model, {}) is None


def test_a_built_model_is_read_back_and_what_is_none_is_one_line() -> None:
    assert read_built_model(built_model_fields(HYBRID)) == HYBRID
    damaged: list[dict[str, Any]] = [{}, {"stages": []}]
    for bad in (*damaged, {**built_model_fields(HYBRID), "vocab": -1}, {"error": "ValueError: no"}):
        with pytest.raises(ValueError, match=r"^not a built model: [^\n]+$"):
            read_built_model(bad)


def test_only_what_changes_the_model_is_asked() -> None:
    args = {"max_num_seqs": 8, "tensor_parallel_size": 1, "dtype": "auto", "kv_cache_dtype": "fp8", "enable_lora": True}
    assert structural(args) == {"kv_cache_dtype": "fp8", "enable_lora": True}
    assert structural({"speculative_config": '{"method": "ngram"}'}) == {"speculative_config": {"method": "ngram"}}
    assert structural({"hf_overrides": "{"}) == {"hf_overrides": "{"}


def test_what_vllm_builds_replaces_the_formulas() -> None:
    args: KnobValues = {"max_model_len": 8192, "kv_cache_memory_bytes": 100 * 2**20}
    budget = estimate(from_config(QWEN), args, H200, evidence=ModelEvidence(HYBRID))
    assert (budget.rung, budget.weights_bytes, budget.exact_layout) == (Rung.BUILT, GIB, True)
    # A request takes eight blocks of 1024 tokens and one for the state; one more is kept back.
    assert budget.request_bytes == 10 * 2**20
    assert budget.kv_tokens == 100 * 8192 // 9


def test_a_model_without_a_cache_needs_none() -> None:
    encoder = BuiltModel((BuiltStage(GIB, 2**27, 0, 0),), (), "cuda", 512, 768, 30522, 16)
    budget = estimate(from_config(QWEN), {}, H200, evidence=ModelEvidence(encoder))
    assert budget.starts
    assert (budget.kv_tokens, budget.kv_bytes_per_token) == (0, 0)


def test_a_model_that_only_vllm_can_read_has_a_budget(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {"model_type": "new", "architectures": ["NewForCausalLM"]})
    known = known_model(str(model), Answers(HYBRID))
    assert "hidden_size is missing" in known.problem
    shape = known.shape_with({})
    assert shape is not None
    budget = Learned().estimator(known)(shape, {}, H200)
    assert budget is not None
    assert (budget.rung, budget.weights_bytes) == (Rung.BUILT, GIB)
    assert known_model(str(model), Answers(None)).shape_with({}) is None


def test_arguments_that_change_the_model_are_estimated_by_vllm_or_not_at_all(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", QWEN)
    args: KnobValues = {"cpu_offload_gb": 4}
    asked, silent = Answers(HYBRID), Answers(None)
    for answers, rung in ((asked, Rung.BUILT), (silent, None)):
        known = known_model(str(model), answers)
        assert known.shape is not None
        budget = Learned().estimator(known)(known.shape, args, H200)
        assert (budget.rung if budget is not None else None) is rung
    assert asked.asked[0] == {"cpu_offload_gb": 4}


def test_a_checkpoint_is_worth_more_than_formulas_and_less_than_vllm(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", LLAMA)
    write_safetensors(model / "model.safetensors", 10**6)
    for answers, args, rung in (
        (None, {}, Rung.CHECKPOINT),
        (None, {"quantization": "fp8"}, Rung.FORMULA),
        (Answers(HYBRID), {}, Rung.BUILT),
    ):
        evidence = known_model(str(model), answers).evidence(args)
        assert evidence.rung is rung
    halves = estimate(from_config(LLAMA), {"tensor_parallel_size": 2}, H200, evidence=ModelEvidence(None, 10**6))
    assert halves.weights_bytes == 500_000


def test_a_name_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("", "../x", "a/b/c", "some/model"):
        assert local_folder(name) is None
    snapshot = write_model_snapshot(tmp_path)
    assert local_folder("some/model") == snapshot


def write_model_snapshot(cache: Path) -> Path:
    folder = cache / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc\n")
    (folder / "snapshots").mkdir()
    return write_model(folder / "snapshots" / "abc", QWEN)


FIELD_VALUES = [
    ("NVIDIA A100-SXM4-40GB", 39.49, 163_168),
    ("NVIDIA RTX A6000", 47.53, 221_824),
    ("NVIDIA H100 NVL", 93.11, 545_456),
]


@pytest.mark.parametrize(("gpu", "total_gib", "tokens"), FIELD_VALUES)
def test_kv_tokens_that_others_reported(gpu: str, total_gib: float, tokens: int) -> None:
    """Llama-3.1-8B with max_model_len 32768 and vLLM's defaults, by formulas only."""
    from vllm_sloguard.guard.machine import Machine

    card = Machine("cuda", int(total_gib * GIB), int((total_gib - 0.5) * GIB), 1, f"NVML: {gpu}")
    budget = estimate(from_config(LLAMA), {"max_model_len": 32768}, card, version=(0, 32))
    assert budget.rung is Rung.FORMULA
    assert budget.kv_tokens == pytest.approx(tokens, rel=0.015)
