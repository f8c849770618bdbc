"""config.json of two model families, an ordinary decoder and one with MLA and experts, and machines for them."""

from typing import Any

from vllm_sloguard.machine import Machine
from vllm_sloguard.memory import GIB
from vllm_sloguard.model_shape import from_config

QWEN: dict[str, Any] = {
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
DEEPSEEK: dict[str, Any] = {
    **QWEN,
    "model_type": "deepseek_v3",
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
}

SMALL = from_config(QWEN)
# About 7 billion parameters: 14.9 GiB in bf16.
LARGE = from_config(
    {
        **QWEN,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
)
WINDOWED = from_config({**QWEN, "use_sliding_window": True, "sliding_window": 4096})
H200 = Machine("cuda", int(139.81 * GIB), int(139.2 * GIB), 1, "NVML: NVIDIA H200")
CROWDED = Machine("cuda", int(139.81 * GIB), int(38.69 * GIB), 1, "NVML: NVIDIA H200")
CONSUMER = Machine("cuda", 24 * GIB, int(23.5 * GIB), 1, "NVML: RTX")
CPU = Machine("cpu", 16 * GIB, int(15.5 * GIB), 0, "meminfo")
