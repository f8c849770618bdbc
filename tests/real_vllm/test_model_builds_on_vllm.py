"""vLLM's own classes, asked by the helper: against ranks that are real processes, and against vLLM's own capacity."""

import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from guard_models import FAMILIES

from vllm_sloguard.agent.build_helper import BuildHelper
from vllm_sloguard.guard.built_model import BuiltModel, GroupKind, read_built_model
from vllm_sloguard.guard.evidence import ModelEvidence
from vllm_sloguard.guard.known_model import shape_of_built
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import estimate
from vllm_sloguard.knobs import KnobValues

pytestmark = pytest.mark.timeout(600)

SPECS = Path(__file__).parents[1] / "support" / "vllm_specs.py"
CPU = Machine("cpu", 2**42, 2**42, 0, "large enough")
MODELS = {name: FAMILIES[name] for name in ("qwen2", "gemma3", "deepseek", "mistral")}
# Two Mamba-2 layers, one with attention, and experts in between.
NEMOTRON_H: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M*-",
    "num_hidden_layers": 5,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
# Starts an engine as benchmarks/guard.py does, in a fresh process, and prints what vLLM reports.
START = """
import json, sys
import guard
guard.import_vllm("cpu")
print("KV tokens:", guard.start(guard.Path(sys.argv[1]), json.loads(sys.argv[2])).kv_tokens)
"""
BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def helper() -> Generator[BuildHelper]:
    asked = BuildHelper(sys.executable, timeout_s=300)
    yield asked
    asked.close()


def write_model(folder: Path, name: str, config: dict[str, Any]) -> Path:
    path = folder / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def built(helper: BuildHelper, model: Path, args: KnobValues) -> BuiltModel:
    return read_built_model(helper.ask(model, args))


def test_simulated_ranks_are_those_of_real_processes(helper: BuildHelper, tmp_path: Path) -> None:
    asked = {"models": MODELS, "layouts": [(2, 1), (1, 2)], "kinds": ["auto"], "budgets": []}
    ended = subprocess.run(
        [sys.executable, str(SPECS)], input=json.dumps(asked), capture_output=True, text=True, timeout=300, check=True
    )
    answers = json.loads(ended.stdout[ended.stdout.index("[{") :])
    assert len(answers) == 2 * len(MODELS)
    for answer in answers:
        name, tp, pp = answer["model"], answer["tp"], answer["pp"]
        folder = tmp_path / name
        model = folder if folder.is_dir() else write_model(tmp_path, name, MODELS[name])
        found = built(helper, model, {"tensor_parallel_size": tp, "pipeline_parallel_size": pp})
        assert [stage.weights_bytes for stage in found.stages] == [stage["weights"] for stage in answer["stages"]]
        each = [stage["bytes_per_token"] for stage in answer["stages"]]
        assert [stage.bytes_per_token for stage in found.stages] == each


@pytest.mark.parametrize("args", [{}, {"max_model_len": 3000}, {"max_num_batched_tokens": 512}], ids=str)
@pytest.mark.parametrize("config", [NEMOTRON_H, *MODELS.values()], ids=lambda config: config["model_type"])
def test_tokens_and_concurrency_are_vllms(
    helper: BuildHelper, tmp_path: Path, config: dict[str, Any], args: KnobValues
) -> None:
    model, kv_bytes = write_model(tmp_path, "model", config), 16 * 2**30
    facts = built(helper, model, {})
    expected = helper.ask(model, args, kv_bytes)
    asked: KnobValues = {"max_num_batched_tokens": 2048, **args, "kv_cache_memory_bytes": kv_bytes}
    found = estimate(shape_of_built(facts), asked, CPU, evidence=ModelEvidence(facts))
    assert found.kv_tokens == expected["tokens"]
    assert found.concurrency == pytest.approx(expected["concurrency"])


def test_a_hybrid_keeps_states_and_keys(helper: BuildHelper, tmp_path: Path) -> None:
    facts = built(helper, write_model(tmp_path, "hybrid", NEMOTRON_H), {})
    assert {group.kind for group in facts.groups} == {GroupKind.STATE, GroupKind.FULL}


def test_a_hybrid_starts_with_the_tokens_of_its_build(helper: BuildHelper, tmp_path: Path) -> None:
    """Against an engine: it chooses the block size of a hybrid only after it has loaded the model."""
    widths = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    small = {**NEMOTRON_H, **widths, "head_dim": 32, "mamba_num_heads": 8, "vocab_size": 2048}
    model, kv_bytes = write_model(tmp_path, "hybrid", small), 2**30
    facts = built(helper, model, {})
    args: KnobValues = {"kv_cache_memory_bytes": kv_bytes, "max_model_len": 1024, "enforce_eager": True}
    guarded = estimate(shape_of_built(facts), args, CPU, evidence=ModelEvidence(facts))
    root = Path(__file__).parents[2]
    started = subprocess.run(
        [sys.executable, "-c", START, str(model), json.dumps(args)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'benchmarks'}"},
    )
    assert f"KV tokens: {guarded.kv_tokens}\n" in started.stdout, started.stderr[-2000:]


def test_an_encoder_keeps_nothing(helper: BuildHelper, tmp_path: Path) -> None:
    facts = built(helper, write_model(tmp_path, "bert", BERT), {})
    assert facts.groups == ()
    assert estimate(shape_of_built(facts), {}, CPU, evidence=ModelEvidence(facts)).kv_bytes_per_token == 0


def test_what_vllm_refuses_is_an_answer_and_the_helper_lives_on(helper: BuildHelper, tmp_path: Path) -> None:
    model = write_model(tmp_path, "model", FAMILIES["qwen2"])
    assert "error" in helper.ask(model, {"tensor_parallel_size": 5})
    assert "error" in helper.ask(model, {"no_such_argument": 1})
    assert built(helper, model, {}).weights_bytes > 0


def test_offloading_adapters_and_context_parallel_ranks_count(helper: BuildHelper, tmp_path: Path) -> None:
    model = write_model(tmp_path, "model", FAMILIES["deepseek"])
    plain = built(helper, model, {})
    offloaded = built(helper, model, {"cpu_offload_gb": 4})
    assert 0 <= plain.weights_bytes - offloaded.weights_bytes - 4 * 2**30 < 2**30
    assert built(helper, model, {"enable_lora": True}).weights_bytes > plain.weights_bytes
