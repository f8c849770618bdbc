"""Services where most configurations crash or miss the SLO, scaled from measured starts and loads.

Each docstring states the source. Step times, costs and crash rules are in shared_card.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine_model import Load, Speed
from shared_card import Card, Crash, Model, Noise, Service

QWEN_1_5B = Model(2.88, 1.54e9, 28, 1536, 28_672, 66_000)
LLAMA_8B = Model(14.96, 8.03e9, 32, 4096, 131_072, 119_000, graph_gib=0.6)
QWEN_7B = Model(14.19, 7.62e9, 28, 3584, 57_344, 142_000, graph_gib=0.5)
H200 = Card(139.8, bandwidth_gbs=4800.0, tflops=171.0)
A100 = Card(79.2, bandwidth_gbs=2000.0, tflops=110.0)
RTX_4090 = Card(23.6, bandwidth_gbs=1000.0, tflops=75.0)


def whole(low: int, high: int) -> dict[str, Any]:
    """An integer knob on a logarithmic scale."""
    return {"type": "int", "low": low, "high": high, "log": True}


def share(low: float, high: float) -> dict[str, Any]:
    """A share."""
    return {"type": "float", "low": low, "high": high}


def one_of(*choices: Any) -> dict[str, Any]:
    """A categorical knob."""
    return {"type": "categorical", "choices": list(choices)}


BASE: dict[str, Mapping[str, Any]] = {
    "max_num_seqs": whole(4, 1024),
    "max_num_batched_tokens": whole(256, 32_768),
    "gpu_memory_utilization": share(0.1, 0.95),
    "max_model_len": whole(1024, 32_768),
    "enforce_eager": one_of(False, True),
    "enable_chunked_prefill": one_of(True, False),
    "enable_prefix_caching": one_of(True, False),
}
DEFAULTS: dict[str, Any] = {
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.25,
    "max_model_len": 8192,
    "enforce_eager": False,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
}


class ManyKnobs(Service):
    """Qwen2-1.5B on an H200 with a neighbour of 60 GiB, and twelve interdependent knobs.

    Scaled from the measured H200 table; the effects of the additional knobs are invented within what vLLM documents:
    one attention backend lacks the 8-bit cache, another needs blocks of 32 or more, and asynchronous scheduling hides
    the host's part of a step, but not in eager mode.
    """

    def refused(self, config: Mapping[str, Any]) -> Crash | None:
        """Two rules unknown to any guard."""
        backend = config["attention_backend"]
        if backend == "a" and config["kv_cache_dtype"] == "fp8":
            return Crash("startup", 16.0)
        if backend == "b" and int(config["block_size"]) < 32:
            return Crash("cuda", 33.0)
        return super().refused(config)

    def speed(self, config: Mapping[str, Any]) -> Speed:
        """The effect of the additional knobs on a step."""
        speed = super().speed(config)
        factor = {"a": 1.0, "b": 0.9, "c": 1.07}[str(config["attention_backend"])]
        hidden = config["async_scheduling"] and not config["enforce_eager"]
        return replace(
            speed,
            graph_ms=speed.graph_ms - (0.35 if hidden else 0.0),
            sequence_us=speed.sequence_us * factor,
            token_us=speed.token_us * factor,
            frontend_ms=speed.frontend_ms + 4.0 / int(config["stream_interval"]),
        )


class LongContext(Service):
    """Qwen2.5-7B on a card of 24 GB: prompts of about 9000 tokens, the longest request 24000.

    Scaled from the measured step times by bandwidth and compute: reading the weights takes as long as CUDA graphs save.
    Half of each prompt is shared, and few requests fit at once.
    """


class Tenant(Service):
    """Qwen2-1.5B on an H200 of which another process holds 100 GiB, as measured: 38.7 GiB free."""


class GrowingTenant(Service):
    """Llama-3.1-8B on an A100 of 80 GB next to a process of 20 GiB that takes 2 to 14 GiB more under load.

    Scaled from the H200's step times by bandwidth and compute. The guard sees the process as it is before the start.
    """


class Saturated(Service):
    """Llama-3.1-8B on an A100 of 80 GB, near its capacity, with tight limits.

    Scaled from the H200's step times by bandwidth and compute. Large batches delay other requests' tokens, small ones
    the first token.
    """


class Noisy(Service):
    """Qwen2-1.5B on the H200 with 70 GiB held by another process, which also interferes: 8% run-to-run spread.

    Step times and memory are as measured there. The noise is invented: one start in 25 is 1.3 to 2 times slower.
    """


LANDSCAPES: dict[str, object] = {
    "tenant": Tenant(
        card=replace(H200, tenant_gib=101.1),
        model=QWEN_1_5B,
        load=Load(34.0, 260, 512, 160, 0.4, 0.4, 3000, 0.5),
        limits={"ttft_p99_ms": 400.0, "itl_p99_ms": 60.0},
        knobs=BASE,
        defaults={**DEFAULTS, "enable_prefix_caching": False},
        needed_len=3000,
        best_ms=553.1,
    ),
    "growing-tenant": GrowingTenant(
        card=replace(A100, tenant_gib=20.0, growth_gib=(2.0, 14.0)),
        model=LLAMA_8B,
        load=Load(1.9, 140, 2600, 300, 0.5, 0.5, 8000, 0.6, 280_000),
        limits={"ttft_p99_ms": 3000.0, "itl_p99_ms": 450.0},
        knobs={**BASE, "gpu_memory_utilization": share(0.2, 0.95)},
        defaults={**DEFAULTS, "gpu_memory_utilization": 0.45, "max_num_batched_tokens": 2048},
        needed_len=8000,
        best_ms=4697.0,
        start_s=12.0,
    ),
    "saturated-8b": Saturated(
        card=replace(A100, tenant_gib=0.8),
        model=LLAMA_8B,
        load=Load(5.5, 200, 800, 150, 0.4, 0.4, 4000, 0.1),
        limits={"ttft_p99_ms": 900.0, "itl_p99_ms": 330.0},
        knobs={
            **BASE,
            "gpu_memory_utilization": share(0.2, 0.98),
            "long_prefill_token_threshold": {"type": "int", "low": 0, "high": 4096},
        },
        defaults={
            **DEFAULTS,
            "gpu_memory_utilization": 0.9,
            "max_num_batched_tokens": 2048,
            "long_prefill_token_threshold": 0,
        },
        needed_len=4000,
        best_ms=4340.0,
        start_s=12.0,
    ),
    "long-context-24gb": LongContext(
        card=replace(RTX_4090, tenant_gib=0.4),
        model=QWEN_7B,
        load=Load(0.35, 60, 9000, 250, 0.5, 0.4, 24_000, 0.5),
        limits={"ttft_p99_ms": 20_000.0, "itl_p99_ms": 700.0},
        knobs={
            **BASE,
            "max_num_seqs": whole(1, 256),
            "gpu_memory_utilization": share(0.5, 0.99),
            "max_model_len": whole(8192, 131_072),
            "kv_cache_dtype": one_of("auto", "fp8"),
        },
        defaults={
            **DEFAULTS,
            "gpu_memory_utilization": 0.9,
            "max_num_batched_tokens": 2048,
            "max_model_len": 32_768,
            "kv_cache_dtype": "auto",
        },
        needed_len=24_000,
        best_ms=8046.0,
        start_s=6.0,
    ),
    "many-knobs": ManyKnobs(
        card=replace(H200, tenant_gib=61.0),
        model=QWEN_1_5B,
        load=Load(40.0, 220, 512, 128, 0.4, 0.4, 3000, 0.3),
        limits={"ttft_p99_ms": 200.0, "itl_p99_ms": 40.0},
        knobs={
            **BASE,
            "block_size": one_of(16, 32, 64, 128),
            "kv_cache_dtype": one_of("auto", "fp8"),
            "stream_interval": one_of(1, 2, 4, 8),
            "attention_backend": one_of("a", "b", "c"),
            "async_scheduling": one_of(False, True),
        },
        defaults={
            **DEFAULTS,
            "gpu_memory_utilization": 0.5,
            "block_size": 16,
            "kv_cache_dtype": "auto",
            "stream_interval": 1,
            "attention_backend": "a",
            "async_scheduling": False,
        },
        needed_len=3000,
        best_ms=396.4,
    ),
    "noisy": Noisy(
        card=replace(H200, tenant_gib=71.0, jitter_gib=1.5),
        model=QWEN_1_5B,
        load=Load(30.0, 180, 512, 128, 0.5, 0.5, 3000, 0.2),
        limits={"ttft_p99_ms": 250.0, "itl_p99_ms": 45.0},
        knobs=BASE,
        defaults={**DEFAULTS, "gpu_memory_utilization": 0.4},
        needed_len=3000,
        best_ms=497.1,
        noise=Noise(0.08, 0.04, (1.3, 2.0)),
    ),
}
