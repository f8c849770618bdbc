"""config.json of the model families, as far as memory depends on it."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_sloguard.machine import Machine
from vllm_sloguard.memory import GIB, estimate
from vllm_sloguard.model_shape import from_config, read, stated

from .models import DEEPSEEK, QWEN


def test_ordinary_decoder() -> None:
    shape = from_config(QWEN)
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim) == (28, 1536, 12, 2, 128)
    assert (shape.tied_embeddings, shape.dtype_bytes, shape.max_model_len) == (True, 2, 32768)
    assert shape.sliding_window is None
    assert (shape.mla, shape.hybrid, shape.experts) == (False, False, 0)


def test_mla_and_experts() -> None:
    shape = from_config(DEEPSEEK)
    assert shape.mla
    assert (shape.kv_lora_rank, shape.qk_rope_head_dim, shape.q_lora_rank) == (512, 64, 0)
    assert (shape.experts, shape.experts_per_token, shape.expert_intermediate) == (64, 6, 1408)
    assert (shape.shared_expert_intermediate, shape.dense_layers) == (2816, 1)


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"head_dim": 64}, "head_dim", 64),
        ({"num_key_value_heads": None}, "kv_heads", 12),
        ({"use_sliding_window": None, "sliding_window": 4096}, "sliding_window", 4096),
        ({"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}, "hybrid", True),
        ({"layer_types": ["full_attention"] * 2}, "hybrid", False),
        ({"layer_types": ["linear_attention", "full_attention"]}, "hybrid", True),
        ({"model_type": "gpt_neox"}, "gated_mlp", False),
        ({"torch_dtype": "float32"}, "dtype_bytes", 4),
        ({"dtype": "torch.float16", "torch_dtype": None}, "dtype_bytes", 2),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized_bits", 4),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized_bits", 8),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "max_model_len", 65536),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "max_model_len", 32768),
        ({"model_max_length": 131072}, "max_model_len", 131072),
        ({"seq_length": 8192}, "max_model_len", 8192),
        ({"max_position_embeddings": None}, "max_model_len", None),
    ],
)
def test_variants(fields: dict[str, Any], name: str, value: object) -> None:
    assert getattr(from_config({**QWEN, **fields}), name) == value


def test_text_config_is_used() -> None:
    nested = from_config({"model_type": "qwen2_vl", "text_config": QWEN, "torch_dtype": "float32"})
    assert nested == from_config(QWEN)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "many"}, "vocab_size must be a positive whole number, got 'many'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive"),
        ({"num_attention_heads": 7}, "hidden_size 1536 is not a multiple"),
        ({"torch_dtype": "int3"}, "torch_dtype 'int3' is not one of"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        from_config({**QWEN, **fields})
    assert "\n" not in str(error.value)


def test_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON"):
        read(tmp_path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="JSON object"):
        read(tmp_path)
    path.write_text(json.dumps(QWEN), encoding="utf-8")
    assert read(tmp_path).layers == 28


@pytest.mark.parametrize(("weights_gib", "kib_a_token"), [(3.0, 64.5), (15.0, 116), (131.0, 232)])
def test_a_model_known_by_its_sizes_alone(weights_gib: float, kib_a_token: float) -> None:
    shape = stated(int(weights_gib * GIB), 131_072, max_model_len=8192)
    machine = Machine("cuda", 80 * GIB, 79 * GIB, 1, "stated")
    budget = estimate(shape, {"max_num_batched_tokens": 1024, "max_model_len": 64}, machine)
    assert budget.weights_bytes == int(weights_gib * GIB)
    assert budget.kv_bytes_per_token == 131_072
    # Worked out from the shapes of Qwen2-1.5B, Llama-3.1-8B and 70B.
    assert abs(budget.activation_bytes / 2**20 / kib_a_token - 1) < 0.1
