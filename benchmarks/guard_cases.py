"""The cases of benchmarks/guard.py: configurations around the memory limit, for models given by their config.json."""

import json
from dataclasses import dataclass, field
from typing import Any

from vllm_sloguard.knobs import KnobValues

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The published config.json of each model, as far as memory depends on it.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_LLAMA,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 4096,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "Qwen2-1.5B": {
        **_LLAMA,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": 32768,
    },
    "Llama-3.1-8B": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "Mistral-7B": {
        **_LLAMA,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "rope_theta": 10000.0,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "Gemma-2-9B": {
        **_LLAMA,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-32B": {
        **_LLAMA,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
    "Llama-3.2-3B": {
        **_LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        **_LLAMA,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
    "Qwen3-8B": {
        **_LLAMA,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "Phi-3-mini": {
        **_LLAMA,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "rope_theta": 10000.0,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    },
    "Gemma-3-1B": {
        **_LLAMA,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
    "Yi-34B": {
        **_LLAMA,
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "vocab_size": 64000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Case:
    """One configuration; another process holds ``tenant_gib`` of the card meanwhile."""

    model: str
    args: KnobValues = field(default_factory=dict[str, Any])
    tenant_gib: float = 0.0

    @property
    def key(self) -> str:
        """Identifies it in the results."""
        return json.dumps([self.model, dict(self.args), self.tenant_gib], sort_keys=True)


def cpu_cases() -> list[Case]:
    """Twenty around the memory limit: explicit cache sizes and one longest request, memory shares, block counts."""
    per_token = 2 * 8 * 64 * 2 * 4  # of the model "tiny": keys and values, heads, width, bytes, layers
    block = 128 * per_token
    lengths = [
        Case("tiny", {"max_model_len": length, "kv_cache_memory_bytes": blocks * block + spare})
        for length, blocks, spare in (
            (1024, 9, 0),
            (1024, 9, -1),
            (1024, 8, 0),
            (1025, 10, 0),
            (1025, 9, 0),
            (4096, 33, 0),
            (4096, 32, block - 1),
            (8192, 65, 0),
            (8192, 64, 0),
            (128, 1, 0),
            (128, 2, 0),
        )
    ]
    small_blocks = [
        Case("tiny", {"max_model_len": 2048, "block_size": 32, "kv_cache_memory_bytes": blocks * 32 * per_token})
        for blocks in (64, 65)
    ]
    wide = [
        Case("tiny", {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": n * block}) for n in (16, 18)
    ]
    memory = [
        Case("tiny", {"kv_cache_memory_bytes": 2**40}),
        Case("tiny", {"gpu_memory_utilization": 0.001}),
        Case("tiny", {"gpu_memory_utilization": 0.02}),
        Case("tiny", {"gpu_memory_utilization": 0.12}),
        Case("tiny", {"gpu_memory_utilization": 1.0}),
    ]
    # Compilation changes no memory on the CPU build, and takes a minute per new shape.
    return [Case(c.model, {**c.args, "enforce_eager": True}) for c in (*lengths, *small_blocks, *wide, *memory)]


def cuda_cases() -> list[Case]:
    """For a card of about 140 GiB, most of them next to a tenant.

    The memory model's constants were fitted on the first thirty; the next thirty are of models that it had not seen;
    ten are at the limit of free memory; the last thirty came after all fixes that these led to.
    """
    return [*_first_cuda_cases(), *_second_cuda_cases(), *_edge_cuda_cases(), *_last_cuda_cases()]


def _first_cuda_cases() -> list[Case]:
    eager: KnobValues = {"enforce_eager": True}
    alone = [
        Case("Qwen2-1.5B", {**eager, "gpu_memory_utilization": 0.9}),
        Case("Qwen2-1.5B", {**eager, "gpu_memory_utilization": 0.3, "max_num_batched_tokens": 65536}),
        Case("Qwen2-1.5B", {**eager, "gpu_memory_utilization": 0.03, "max_model_len": 8192}),
        Case("Qwen2-1.5B", {**eager, "gpu_memory_utilization": 0.02}),
        Case("Qwen2-1.5B", {**eager, "gpu_memory_utilization": 0.5, "kv_cache_dtype": "fp8", "max_num_seqs": 16}),
        Case("Llama-3.1-8B", {**eager, "gpu_memory_utilization": 0.9, "max_model_len": 32768}),
        Case("Llama-3.1-8B", {**eager, "gpu_memory_utilization": 0.1}),
        Case("Llama-3.1-8B", {**eager, "gpu_memory_utilization": 0.13, "max_model_len": 32768}),
        Case("Llama-3.1-8B", {**eager, "gpu_memory_utilization": 0.4, "quantization": "fp8", "max_num_seqs": 64}),
        Case("Llama-3.1-8B", {"gpu_memory_utilization": 0.6, "max_num_seqs": 128, "max_num_batched_tokens": 4096}),
        Case("Mistral-7B", {**eager, "gpu_memory_utilization": 0.5}),
        Case("Gemma-2-9B", {**eager, "gpu_memory_utilization": 0.5, "max_num_batched_tokens": 2048}),
        Case("Gemma-2-9B", {**eager, "gpu_memory_utilization": 0.92, "max_num_seqs": 256}),
        Case("Qwen2.5-32B", {**eager, "gpu_memory_utilization": 0.7, "max_num_seqs": 32}),
        Case("Qwen2.5-32B", {**eager, "gpu_memory_utilization": 0.45}),
    ]
    shared = [
        Case("Qwen2-1.5B", {**eager, "gpu_memory_utilization": 0.92}, 60),
        Case("Qwen2-1.5B", {**eager, "gpu_memory_utilization": 0.5}, 60),
        Case("Qwen2-1.5B", {**eager, "gpu_memory_utilization": 0.57, "max_num_seqs": 1024}, 60),
        Case("Qwen2-1.5B", {**eager, "kv_cache_memory_bytes": 20 * 2**30}, 60),
        Case("Qwen2-1.5B", {**eager, "gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 20 * 2**30}, 60),
        Case("Qwen2-1.5B", {"gpu_memory_utilization": 0.3, "max_num_seqs": 256}, 60),
        Case("Llama-3.1-8B", {**eager, "gpu_memory_utilization": 0.5, "max_num_batched_tokens": 32768}, 60),
        Case("Llama-3.1-8B", {**eager, "gpu_memory_utilization": 0.95}, 60),
        Case("Llama-3.1-8B", {**eager, "gpu_memory_utilization": 0.2, "max_num_batched_tokens": 2048}, 60),
        Case("Qwen2-1.5B", {**eager}, 115),
        Case("Qwen2-1.5B", {**eager, "gpu_memory_utilization": 0.15, "max_num_batched_tokens": 16384}, 115),
        Case("Llama-3.1-8B", {**eager, "gpu_memory_utilization": 0.15}, 115),
        Case("Llama-3.1-8B", {**eager, "gpu_memory_utilization": 0.15, "max_model_len": 16384}, 115),
        Case("Mistral-7B", {**eager, "gpu_memory_utilization": 0.15, "max_num_batched_tokens": 1024}, 115),
        Case("Gemma-2-9B", {**eager, "gpu_memory_utilization": 0.16, "max_model_len": 8192}, 115),
    ]
    return [*alone, *shared]


def _second_cuda_cases() -> list[Case]:
    eager: KnobValues = {"enforce_eager": True}
    alone = [
        Case("Llama-3.2-3B", {**eager, "gpu_memory_utilization": 0.9}),
        Case("Llama-3.2-3B", {**eager, "gpu_memory_utilization": 0.04}),
        Case("Llama-3.2-3B", {"gpu_memory_utilization": 0.35, "max_num_seqs": 64, "max_num_batched_tokens": 2048}),
        Case("Llama-3.2-3B", {**eager, "gpu_memory_utilization": 0.1, "max_model_len": 40000}),
        Case("Qwen2.5-7B", {**eager, "gpu_memory_utilization": 0.8, "max_num_seqs": 512}),
        Case("Qwen2.5-7B", {**eager, "gpu_memory_utilization": 0.125, "max_num_batched_tokens": 2048}),
        Case("Qwen2.5-7B", {"gpu_memory_utilization": 0.5, "max_num_batched_tokens": 16384}),
        Case("Qwen3-8B", {**eager, "gpu_memory_utilization": 0.6, "kv_cache_dtype": "fp8"}),
        Case("Qwen3-8B", {**eager, "gpu_memory_utilization": 0.14, "quantization": "fp8"}),
        Case("Qwen3-8B", {**eager, "gpu_memory_utilization": 0.155}),
        Case("Phi-3-mini", {**eager, "gpu_memory_utilization": 0.5}),
        Case("Gemma-3-1B", {**eager, "gpu_memory_utilization": 0.3, "max_num_seqs": 256}),
        Case("Gemma-3-1B", {**eager, "gpu_memory_utilization": 0.7}),
        Case("Yi-34B", {**eager, "gpu_memory_utilization": 0.9, "max_num_batched_tokens": 32768}),
        Case("Yi-34B", {**eager, "gpu_memory_utilization": 0.475, "max_num_seqs": 16}),
    ]
    shared = [
        Case("Llama-3.2-3B", {**eager, "max_num_seqs": 128}, 40),
        Case("Llama-3.2-3B", {**eager, "gpu_memory_utilization": 0.7, "max_num_batched_tokens": 65536}, 40),
        Case("Qwen2.5-7B", {**eager, "gpu_memory_utilization": 0.66}, 40),
        Case("Qwen3-8B", {**eager, "gpu_memory_utilization": 0.71}, 40),
        Case("Qwen3-8B", {"gpu_memory_utilization": 0.4, "max_num_seqs": 32, "max_num_batched_tokens": 1024}, 40),
        Case("Phi-3-mini", {**eager, "gpu_memory_utilization": 0.3, "dtype": "float16"}, 40),
        Case("Yi-34B", {**eager, "gpu_memory_utilization": 0.95}, 40),
        Case("Yi-34B", {**eager, "kv_cache_memory_bytes": 2**35, "gpu_memory_utilization": 0.6}, 40),
        Case("Llama-3.2-3B", {**eager, "gpu_memory_utilization": 0.2, "max_model_len": 16384}, 110),
        Case("Llama-3.2-3B", {**eager, "gpu_memory_utilization": 0.12}, 110),
        Case("Qwen2.5-7B", {**eager, "gpu_memory_utilization": 0.18, "max_num_batched_tokens": 4096}, 110),
        Case("Qwen3-8B", {**eager, "gpu_memory_utilization": 0.19}, 110),
        Case("Phi-3-mini", {**eager, "gpu_memory_utilization": 0.1}, 110),
        Case("Gemma-3-1B", {**eager, "gpu_memory_utilization": 0.15}, 110),
        Case("Yi-34B", {**eager, "gpu_memory_utilization": 0.2}, 110),
    ]
    return [*alone, *shared]


def _edge_cuda_cases() -> list[Case]:
    eager: KnobValues = {"enforce_eager": True}
    shares = [
        Case("Qwen3-8B", {**eager, "gpu_memory_utilization": share}, 45) for share in (0.66, 0.665, 0.67, 0.675, 0.68)
    ]
    lengths = [
        Case("Llama-3.1-8B", {**eager, "gpu_memory_utilization": 0.15, "max_model_len": length}, 45)
        for length in (38000, 39000, 39600, 40000, 41000)
    ]
    return [*shares, *lengths]


def _last_cuda_cases() -> list[Case]:
    eager: KnobValues = {"enforce_eager": True}
    alone = [
        Case(model, {**eager, "gpu_memory_utilization": share, **more})
        for model, share, more in (
            ("Llama-3.1-8B", 0.99, {"max_num_seqs": 128}),
            ("Llama-3.1-8B", 0.999, {}),
            ("Llama-3.1-8B", 0.125, {"max_model_len": 8192}),
            ("Llama-3.1-8B", 0.124, {"max_model_len": 8192}),
            ("Llama-3.1-8B", 0.7, {"kv_cache_dtype": "fp8", "max_num_batched_tokens": 16384}),
            ("Qwen2.5-7B", 0.993, {}),
            ("Qwen2.5-7B", 0.12, {"max_model_len": 4096}),
            ("Qwen2.5-7B", 0.115, {"max_model_len": 4096}),
            ("Qwen2.5-7B", 0.3, {"max_num_seqs": 32, "max_num_batched_tokens": 2048}),
            ("Llama-3.2-3B", 0.052, {"max_model_len": 4096}),
            ("Llama-3.2-3B", 0.06, {"max_model_len": 4096}),
            ("Llama-3.2-3B", 0.45, {"max_num_batched_tokens": 32768}),
            ("Qwen2-1.5B", 0.995, {}),
            ("Qwen2-1.5B", 0.04, {"max_model_len": 4096}),
            ("Qwen2-1.5B", 0.6, {"dtype": "float32"}),
        )
    ]
    shared = [
        Case(model, {**eager, "gpu_memory_utilization": share, **more}, 90)
        for model, share, more in (
            ("Llama-3.1-8B", 0.33, {}),
            ("Llama-3.1-8B", 0.345, {"max_num_seqs": 256}),
            ("Llama-3.1-8B", 0.348, {"max_num_seqs": 256}),
            ("Llama-3.1-8B", 0.4, {"max_model_len": 65536}),
            ("Llama-3.1-8B", 0.2, {"max_model_len": 90000}),
            ("Qwen2.5-7B", 0.34, {}),
            ("Qwen2.5-7B", 0.344, {}),
            ("Qwen2.5-7B", 0.25, {"max_num_batched_tokens": 65536}),
            ("Llama-3.2-3B", 0.34, {}),
            ("Llama-3.2-3B", 0.345, {"max_num_seqs": 512}),
            ("Llama-3.2-3B", 0.35, {}),
            ("Qwen2-1.5B", 0.34, {}),
            ("Qwen2-1.5B", 0.347, {"max_num_seqs": 64}),
            ("Qwen2-1.5B", 0.36, {}),
            ("Qwen2-1.5B", 0.1, {"max_num_batched_tokens": 98304}),
        )
    ]
    return [*alone, *shared]
