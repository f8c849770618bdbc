"""The search space of the SLO-Guard study (arXiv 2604.17627), from its 150 published trials under concurrent requests.

Latencies are medians of those trials, and the noise is the standard deviation of the logarithm within a group; the
groups follow the trials: eager or not, and fewer sequences than the five requests need. TTFT and ITL were not
published: here they are derived from the latency and its 100 tokens per request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

TOKENS_A_REQUEST = 100
WAVES, WAVE_S = 12, 3.0  # how often the five requests are sent, and how many seconds apart
# Chunked prefill, prefix caching, lengths, batches and shares made no difference beyond the noise.
LATENCY_MS = {
    # (eager, sequences): median latency, ms, and standard deviation of its logarithm
    (True, "four"): (2511.0, 0.017),  # 8 trials; the fifth request waits
    (True, "more"): (2132.0, 0.015),  # 54 trials
    (False, "four"): (627.0, 0.08),  # 2 trials
    (False, "five to seven"): (928.0, 0.01),  # 2 trials; a batch of five then fits no captured graph
    (False, "more"): (484.0, 0.021),  # 84 trials, at 31 sequences
}
SEQUENCES_EXPONENT = {True: 0.0107, False: -0.0261}  # least squares over the last groups; t = 4.6 and -8.9


class Study:
    """The study's space, machine and load: one binary knob decides nearly everything, and nothing crashes."""

    fast_ms = 1000.0

    def space(self) -> dict[str, dict[str, Any]]:
        """Ranges as published; chunked prefill was a knob where not eager."""
        return {
            "max_num_seqs": {"type": "int", "low": 4, "high": 128, "log": True},
            "max_num_batched_tokens": {"type": "int", "low": 512, "high": 8192, "log": True},
            "gpu_memory_utilization": {"type": "float", "low": 0.60, "high": 0.95},
            "max_model_len": {"type": "int", "low": 512, "high": 4096, "log": True},
            "enforce_eager": {"type": "categorical", "choices": [False, True]},
            "enable_chunked_prefill": {
                "type": "categorical",
                "choices": [True, False],
                "requires": {"enforce_eager": False},
            },
            "enable_prefix_caching": {"type": "categorical", "choices": [True, False]},
        }

    def host(self) -> dict[str, float]:
        """An empty A100 of 40 GB, and Qwen2-1.5B: 28 layers, 2 KV heads of 128, bf16."""
        return {
            "gpu_total_gib": 39.4,
            "gpu_free_gib": 38.9,
            "weights_gib": 2.88,
            "kv_bytes_per_token": 28672,
            "max_len_needed": 512,
        }

    def slo(self) -> dict[str, float]:
        """As published."""
        return {"ttft_p99_ms": 2000.0, "itl_p99_ms": 200.0}

    def incumbent(self) -> dict[str, Any]:
        """vLLM's defaults, clipped to the ranges."""
        return {
            "max_num_seqs": 128,
            "max_num_batched_tokens": 2048,
            "gpu_memory_utilization": 0.9,
            "max_model_len": 4096,
            "enforce_eager": False,
            "enable_chunked_prefill": True,
            "enable_prefix_caching": True,
        }

    def best_known(self) -> float:
        """Noise-free: not eager, with the most sequences."""
        return expected(False, 128)[0]

    def serve(self, config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """One trial: the study's five concurrent requests, in waves. They were repaired first, so none crashes."""
        eager = bool(config["enforce_eager"])
        median_ms, sd = expected(eager, int(config["max_num_seqs"]))
        latency_s = median_ms / 1000 * float(np.exp(rng.normal(0.0, sd)))
        step_s = latency_s / TOKENS_A_REQUEST
        # With four sequences, the fifth request waits for another to finish.
        waits = [0.0] * 4 + [0.7 * latency_s if int(config["max_num_seqs"]) < 5 else 0.0]
        requests: list[dict[str, Any]] = []
        for wave in range(WAVES):
            for wait_s in waits:
                ttft_s = 3 * step_s + wait_s
                gaps = (latency_s - 3 * step_s) / TOKENS_A_REQUEST * rng.uniform(0.98, 1.02, TOKENS_A_REQUEST - 1)
                requests.append(
                    {
                        "start_s": wave * WAVE_S,
                        "ttft_s": ttft_s,
                        "e2e_s": latency_s,
                        "itls_s": gaps,
                        "error": None,
                    }
                )
        # Starts with a warm cache, measured on another card: 42 s eager, 68 s with CUDA graphs.
        return {"crash": None, "start_s": 42.0 if eager else 68.0, "planned": len(requests), "requests": requests}


def expected(eager: bool, sequences: int) -> tuple[float, float]:
    """The median latency of a configuration, ms, and the standard deviation of its logarithm."""
    if sequences < 5:
        return LATENCY_MS[eager, "four"]
    if not eager and sequences < 8:
        return LATENCY_MS[False, "five to seven"]
    median_ms, sd = LATENCY_MS[eager, "more"]
    return median_ms * (sequences / (24 if eager else 31)) ** SEQUENCES_EXPONENT[eager], sd


LANDSCAPES: dict[str, object] = {"paper": Study()}
