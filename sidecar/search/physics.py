"""What is known of vLLM before anything is measured: which way each knob moves a latency, roughly.

The numbers are changes of the natural logarithm: of a number for each factor of e (for a share, from 0 to 1), of a
choice against the others.
They are a prior mean, so what is measured replaces them. Signs and sizes follow measurements on an H200 (vLLM 0.26):
eager mode takes 14.7 ms a token where graphs take 2.0, eight tokens in one piece 122 ms; too few sequences queue for
seconds.
"""

from collections.abc import Mapping

import numpy as np

from sidecar.search.encoding import Array, Encoding, span
from vllm_sloguard.knobs import Value

_SLOPES: Mapping[str, Mapping[str, float]] = {
    "latency": {"gpu_memory_utilization": -0.3},
    "ttft_p99_ms": {"max_num_seqs": -0.4, "gpu_memory_utilization": -1.5, "max_num_batched_tokens": -0.1},
    "itl_p99_ms": {"max_num_seqs": 0.06, "max_num_batched_tokens": 0.2},
    "e2e_p99_ms": {"max_num_seqs": -0.06, "gpu_memory_utilization": -0.5},
}
_CHOICES: Mapping[str, Mapping[tuple[str, Value], float]] = {
    "latency": {("enforce_eager", True): 0.5, ("enable_prefix_caching", False): 0.1},
    "ttft_p99_ms": {("enforce_eager", True): 0.4, ("enable_prefix_caching", False): 0.1},
    "itl_p99_ms": {
        ("enforce_eager", True): 0.5,
        ("enable_chunked_prefill", False): 0.4,
        ("stream_interval", 2): 0.5,
        ("stream_interval", 4): 1.0,
        ("stream_interval", 8): 1.5,
    },
    "e2e_p99_ms": {("enforce_eager", True): 0.5},
}
# Knobs that move latencies little over their range, so that longer lengthscales are expected.
_STRETCH: Mapping[str, float] = {
    "max_model_len": 8.0,
    "block_size": 2.0,
}


def expected(encoding: Encoding, target: str, places: Array) -> Array:
    """The prior mean of ``target`` ("latency", or a constraint), up to a constant. Shape (places,)."""
    total = np.zeros(len(places))
    slopes, choices = _SLOPES.get(target, {}), _CHOICES.get(target, {})
    for column, knob in enumerate(encoding.space.knobs):
        if encoding.categorical[column]:
            by_choice = np.array([choices.get((knob.name, choice), 0.0) for choice in knob.choices])
            total += by_choice[places[:, column].astype(int)]
        else:
            total += slopes.get(knob.name, 0.0) * span(knob) * places[:, column]
    return total


def stretch(encoding: Encoding) -> Array:
    """By how much longer each knob's lengthscale is expected to be. Shape (knobs,)."""
    return np.array([_STRETCH.get(knob.name, 1.0) for knob in encoding.space.knobs])
