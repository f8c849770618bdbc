"""The config.json of each model family, as far as memory depends on it."""

import json
from pathlib import Path
from typing import Any

import pytest
from guard_models import DEEPSEEK, FAMILIES, GEMMA2, GEMMA3, LLAMA, MISTRAL, QWEN
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB, estimate
from vllm_sloguard.guard.model_shape import ModelShape, from_config, read_shape, stated


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


def test_experts_by_the_names_of_other_families() -> None:
    ernie = {"moe_num_experts": 64, "moe_k": 6, "moe_intermediate_size": 1536, "moe_num_shared_experts": 2}
    hunyuan = {
        "num_experts": 64,
        "moe_topk": [8, 8],
        "moe_intermediate_size": [3072, 1024],
        "num_shared_expert": [1, 1],
    }

    one, other = from_config({**QWEN, **ernie, "moe_layer_start_index": 1}), from_config({**QWEN, **hunyuan})

    assert (one.experts, one.experts_per_token, one.expert_intermediate) == (64, 6, 1536)
    assert (one.shared_expert_intermediate, one.dense_layers) == (3072, 1)
    assert (other.experts_per_token, other.expert_intermediate, other.shared_expert_intermediate) == (8, 3072, 3072)


LONGROPE = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope"},
}


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"head_dim": 64}, "head_dim", 64),
        ({"num_key_value_heads": None}, "kv_heads", 12),
        ({"use_sliding_window": None, "sliding_window": 4096}, "sliding_window", None),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding_window", None),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}, "sliding_window", 4096),
        ({"use_sliding_window": True, "max_window_layers": 27}, "windowed", (False,) * 27 + (True,)),
        ({"layer_types": ["full_attention"] * 28, "use_sliding_window": True}, "sliding_window", None),
        ({"layer_types": ["full_attention"] * 28}, "hybrid", False),
        ({"layer_types": ["linear_attention", "full_attention"] * 14}, "hybrid", True),
        ({"mamba_d_state": 16}, "hybrid", True),
        ({"layer_types": ["chunked_attention", "full_attention"] * 14}, "hybrid", True),
        (LONGROPE, "default_model_len", 4096),
        (LONGROPE, "max_model_len", 131072),
        ({"model_type": "gpt_neox"}, "gated_mlp", False),
        ({"model_type": "arcee"}, "gated_mlp", False),
        ({"intermediate_size": 12288, "block_auto_adjust_ff_dim": True}, "intermediate", 8192),
        ({"intermediate_size": 10752, "block_auto_adjust_ff_dim": True}, "intermediate", 7168),
        ({"intermediate_size": 12288, "block_auto_adjust_ff_dim": False}, "intermediate", 12288),
        ({"torch_dtype": "float32"}, "dtype_bytes", 4),
        ({"dtype": "torch.float16", "torch_dtype": None}, "dtype_bytes", 2),
        ({"tie_word_embeddings": None}, "tied_embeddings", False),
        ({"tie_word_embeddings": None, "model_type": "gemma"}, "tied_embeddings", True),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "max_model_len", 16384),
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
        ({"torch_dtype": "int3"}, "torch_dtype must be one of .* got 'int3'"),
        ({"torch_dtype": {}, "dtype": ["bfloat16"]}, "torch_dtype must be one of"),
        ({"num_hidden_layers": 10**5000}, "num_hidden_layers must be at most 2.40, got a very large int"),
        ({"hidden_size": float("nan")}, "hidden_size must be a positive whole number, got nan"),
        ({"model_type": ["qwen2"]}, "model_type must be a text"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"text_config": "none"}, "text_config must be an object"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden_layers is 28"),
        ({"layer_types": [1] * 28}, "layer_types must be a list of texts"),
        ({"model_type": "gemma2", "num_hidden_layers": 10**6, "use_sliding_window": True}, "at most 10000"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "rope_scaling.factor must be a number"),
        ({"rope_scaling": []}, "rope_scaling must be an object"),
        ({"quantization_config": "awq"}, "quantization_config must be an object"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 99}}, "quantization_config.bits must be at most 16"),
        ({"quantization_config": {"quant_method": "awq", "group_size": 0}}, "group_size must be"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        from_config({**QWEN, **fields})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("found", "bits"),
    [
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "fbgemm_fp8"}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", "group_size": 128}}},
            },
            4 + 16 / 128,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}},
            },
            4.5,
        ),
    ],
)
def test_bits_of_a_quantized_checkpoint(found: dict[str, Any], bits: float) -> None:
    shape = from_config({**QWEN, "quantization_config": found})
    assert shape.quantization is not None
    assert shape.quantization.bits == bits


def test_an_unknown_quantization_counts_in_full() -> None:
    assert from_config({**QWEN, "quantization_config": {"quant_method": "new"}}).quantization is None


def test_windows_that_families_leave_unsaid() -> None:
    gemma2, gemma3 = from_config(GEMMA2), from_config(GEMMA3)
    assert (gemma2.windowed[:4], sum(gemma2.windowed)) == ((True, False, True, False), 21)
    assert (gemma3.windowed[:7], sum(gemma3.windowed)) == ((True,) * 5 + (False, True), 22)
    assert gemma2.tied_embeddings
    assert (gemma2.sliding_window, gemma2.hybrid) == (4096, False)
    every = from_config(MISTRAL)
    assert (every.sliding_window, every.windowed) == (4096, ())
    # google/gemma-3-4b-it leaves most of it out.
    short = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    shape = from_config({"model_type": "gemma3", "text_config": {**short, "sliding_window": 1024}})
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocab) == (8, 4, 256, 262208)
    assert (shape.sliding_window, sum(shape.windowed), shape.max_model_len) == (1024, 29, 131072)


def test_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_shape(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON"):
        read_shape(tmp_path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="JSON object"):
        read_shape(tmp_path)
    for text in (b"\xff\xfe", b"[" * 100_000, b'{"hidden_size": ' + b"9" * 5000 + b"}"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="not JSON") as error:
            read_shape(tmp_path)
        assert "\n" not in str(error.value)
    path.write_text(json.dumps(QWEN), encoding="utf-8")
    assert read_shape(tmp_path).layers == 28
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot be read"):
        read_shape(tmp_path / "folder")


# Every field that is read, and what a hand or a tool may write there.
NESTED = ("bits", "group_size", "factor", "config_groups", "weights", "quant_method", "rope_type", "num_bits", "type")
FIELDS = sorted(
    {key for config in FAMILIES.values() for key in config}
    | {"text_config", "rope_scaling", "rope_parameters", "sliding_window_pattern", "dtype", "decoder_sparse_step"}
    | {"attention_chunk_size", "max_window_layers", "model_max_length", "original_max_position_embeddings"}
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.sampled_from([2**20, 2**40, 10**40, 10**400, 1e300, float("nan"), float("inf"), -0.0])
    | st.text(max_size=4)
    | st.sampled_from(["bfloat16", "linear", "fp8", "gptq", "mxfp4", "compressed-tensors", "gemma2", "falcon"])
)
KEYS = st.sampled_from(
    ["factor", "rope_type", "quant_method", "bits", "group_size", "config_groups", "weights", *FIELDS]
)
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
ARGS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "tensor_parallel_size": st.sampled_from([1, 2, 64, 10**9]),
        "pipeline_parallel_size": st.sampled_from([1, 2, 3, 64, 65, 10**9]),
        "kv_cache_dtype": st.sampled_from(["auto", "fp8", "bfloat16", "fp8_ds_mla", "fp8_per_token_head"]),
        "max_model_len": st.sampled_from([-1, 1, 100, 10**9]),
        "max_num_seqs": st.sampled_from([1, 1024, 10**9]),
        "max_num_batched_tokens": st.sampled_from([1, 8192, 10**9]),
        "enable_chunked_prefill": st.booleans(),
        "enforce_eager": st.booleans(),
        "quantization": st.sampled_from(["fp8", "bitsandbytes", "new"]),
    },
)


def shape_or_line(config: dict[str, Any]) -> ModelShape | str:
    try:
        return from_config(config)
    except ValueError as error:
        return str(error)


@settings(max_examples=300)
@given(
    base=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    lost=st.frozensets(st.sampled_from(FIELDS), max_size=3),
    args=ARGS,
)
def test_any_config_is_a_shape_or_one_clear_line(
    base: str, changes: dict[str, Any], lost: frozenset[str], args: dict[str, Any]
) -> None:
    config = {key: value for key, value in {**FAMILIES[base], **changes}.items() if key not in lost}
    shape = shape_or_line(config)
    if isinstance(shape, str):
        assert "\n" not in shape
        assert len(shape) < 250
        assert any(field in shape for field in (*FIELDS, *NESTED))
        return
    for machine in (Machine("cuda", 80 * GIB, 79 * GIB, 1, "H100"), Machine("cpu", 16 * GIB, 8 * GIB, 0, "meminfo")):
        budget = estimate(shape, args, machine, version=(0, 32))
        assert budget.weights_bytes > 0
        assert budget.kv_bytes_per_token > 0
        assert budget.kv_tokens >= 0
        assert budget.reason
        again = estimate(shape, {**args, "gpu_memory_utilization": 0.95}, machine, version=(0, 32))
        assert again.kv_bytes > budget.kv_bytes


@pytest.mark.parametrize(("weights_gib", "kib_a_token"), [(3.0, 64.5), (15.0, 116), (131.0, 232)])
def test_a_model_known_by_its_sizes_alone(weights_gib: float, kib_a_token: float) -> None:
    shape = stated(int(weights_gib * GIB), 131_072, max_model_len=8192)
    machine = Machine("cuda", 80 * GIB, 79 * GIB, 1, "stated")
    budget = estimate(shape, {"max_num_batched_tokens": 8192, "max_model_len": 64}, machine)
    assert budget.weights_bytes == int(weights_gib * GIB)
    assert budget.kv_bytes_per_token == 131_072
    # Worked out from the shapes of Qwen2-1.5B, Llama-3.1-8B and 70B.
    assert abs(budget.activation_bytes / 2**13 / 2**10 / kib_a_token - 1) < 0.1


def test_configurations_that_once_could_not_be_read() -> None:
    """Each layout is that of a published model."""
    # A list that says of each layer whether it has experts.
    listed = from_config({**DEEPSEEK, "first_k_dense_replace": 0, "moe_layer_freq": [0, *[1] * 26]})
    assert (listed.dense_layers, listed.expert_step) == (1, 1)
    # ChatGLM's name for the vocabulary.
    chatglm = {k: v for k, v in LLAMA.items() if k != "vocab_size"}
    chatglm |= {"model_type": "chatglm", "padded_vocab_size": 65024}
    assert from_config(chatglm).vocab == 65024
    # Multimodal models leave out what is as their language model's class has it.
    nested = from_config({"model_type": "llava", "text_config": {"model_type": "llama"}})
    assert (nested.layers, nested.hidden, nested.heads) == (32, 4096, 32)


def test_an_encoder_decoder_is_read_and_its_cache_not_claimed() -> None:
    whisper = {
        "model_type": "whisper",
        "d_model": 1280,
        "decoder_layers": 32,
        "decoder_attention_heads": 20,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "decoder_ffn_dim": 5120,
        "vocab_size": 51866,
        "max_target_positions": 448,
    }
    shape = from_config(whisper)
    assert (shape.layers, shape.heads, shape.intermediate) == (32, 20, 5120)
    assert not shape.ordinary


def test_gpt_bigcode_has_one_kv_head() -> None:
    starcoder = {
        "model_type": "gpt_bigcode",
        "n_embd": 6144,
        "n_layer": 40,
        "n_head": 48,
        "n_inner": 24576,
        "n_positions": 8192,
        "vocab_size": 49152,
        "multi_query": True,
    }
    assert from_config(starcoder).kv_heads == 1
    assert from_config({**starcoder, "multi_query": False}).kv_heads == 48


@pytest.mark.parametrize(
    ("fields", "kv_layers"),
    [
        ({"model_type": "qwen3_next", "full_attention_interval": 4, "linear_num_value_heads": 32}, 7),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-" * 5 + "M*E", "ssm_state_size": 128}, 6),
        ({"model_type": "bamba", "layers_block_type": ["mamba"] * 25 + ["attention"] * 3, "mamba_d_state": 256}, 3),
        ({"model_type": "falcon_mamba", "ssm_state_size": 16}, None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_hybrids_count_the_layers_that_keep_keys_and_values(fields: dict[str, Any], kv_layers: int | None) -> None:
    shape = from_config({**QWEN, **fields})
    assert shape.kv_layers == kv_layers
    assert shape.hybrid
    assert not shape.ordinary


def test_what_stays_wide_in_nvfp4_is_not_claimed() -> None:
    modelopt = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    assert not from_config({**LLAMA, "quantization_config": modelopt}).ordinary
    assert from_config({**LLAMA, "quantization_config": {"quant_method": "fp8"}}).ordinary
