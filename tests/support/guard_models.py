"""Published config.json values that memory depends on, by model family; and machines."""

from typing import Any

from vllm_sloguard.guard.evidence import ModelEvidence
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB, Budget, estimate, weights_bytes
from vllm_sloguard.guard.model_shape import ModelShape, from_config
from vllm_sloguard.knobs import KnobValues

QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
MISTRAL: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
# Neither Gemma writes down which layers have the window, nor that its embeddings are tied.
GEMMA2: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_size": 3584,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "intermediate_size": 14336,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
}
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "intermediate_size": 6912,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
}
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 10944,
    "vocab_size": 102400,
    "tie_word_embeddings": False,
    "max_position_embeddings": 163840,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "torch_dtype": "bfloat16",
}
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "vocab_size": 201088,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}
QWEN2_MOE: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20480,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": False,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
PHI3: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "vocab_size": 32064,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "torch_dtype": "bfloat16",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": QWEN,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "deepseek": DEEPSEEK,
    "gpt_oss": GPT_OSS,
    "qwen3_moe": QWEN3_MOE,
    "qwen2_moe": QWEN2_MOE,
    "phi3": PHI3,
}


def with_checkpoint(shape: ModelShape, args: KnobValues, machine: Machine) -> Budget:
    """The estimate for a model whose checkpoint's headers say the same as the formulas: enough to refuse on."""
    plain = {name: value for name, value in args.items() if name in ("dtype", "quantization")}
    return estimate(shape, args, machine, evidence=ModelEvidence(checkpoint_bytes=weights_bytes(shape, plain)))


SMALL = from_config(QWEN)
# About 7 billion parameters: 14.9 GiB in bf16.
LARGE = from_config({**LLAMA, "max_position_embeddings": QWEN["max_position_embeddings"]})
WINDOWED = from_config({**QWEN, "use_sliding_window": True, "max_window_layers": 0, "sliding_window": 4096})
H200 = Machine("cuda", int(139.81 * GIB), int(139.2 * GIB), 1, "NVML: NVIDIA H200")
CROWDED = Machine("cuda", int(139.81 * GIB), int(38.69 * GIB), 1, "NVML: NVIDIA H200")
CONSUMER = Machine("cuda", 24 * GIB, int(23.5 * GIB), 1, "NVML: RTX")
CPU = Machine("cpu", 16 * GIB, int(15.5 * GIB), 0, "meminfo")


QWEN_SHAPE = from_config({**QWEN, "max_position_embeddings": 8192})
H200_141GB = Machine("cuda", int(139.81 * GIB), int(139.2 * GIB), 1, "NVML: NVIDIA H200")

# What vLLM 0.26 reported with Qwen2-1.5B's shape.
MEASURED: list[tuple[KnobValues, int]] = [
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
