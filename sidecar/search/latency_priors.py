"""What is known of vLLM before anything is measured: which way each knob moves a latency, roughly.

The numbers are changes of the natural logarithm: of a number for each factor of e (for a share, from 0 to 1), of a
choice against the others. Those of eager mode are shares of what ``eager_effect`` says.
They are a prior mean, so what is measured replaces them. Signs and sizes follow measurements on an H200 (vLLM 0.26):
eager mode takes 14.7 ms a token where graphs take 2.0, eight tokens in one piece 122 ms; too few sequences queue for
seconds.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sidecar.search.contract import Observation
from sidecar.search.encoding import Array, Encoding, span
from vllm_sloguard.knobs import Value

_SLOPES: Mapping[str, Mapping[str, float]] = {
    "latency": {"gpu_memory_utilization": -0.3},
    "ttft_p99_ms": {"max_num_seqs": -0.4, "gpu_memory_utilization": -1.5, "max_num_batched_tokens": -0.1},
    "itl_p99_ms": {"max_num_seqs": 0.06, "max_num_batched_tokens": 0.2},
    "e2e_p99_ms": {"max_num_seqs": -0.06, "gpu_memory_utilization": -0.5},
}
_CHOICES: Mapping[str, Mapping[tuple[str, Value], float]] = {
    "latency": {("enforce_eager", True): 1.0, ("enable_prefix_caching", False): 0.1},
    "ttft_p99_ms": {("enforce_eager", True): 0.8, ("enable_prefix_caching", False): 0.1},
    "itl_p99_ms": {
        ("enforce_eager", True): 1.0,
        ("enable_chunked_prefill", False): 0.4,
        ("stream_interval", 2): 0.5,
        ("stream_interval", 4): 1.0,
        ("stream_interval", 8): 1.5,
    },
    "e2e_p99_ms": {("enforce_eager", True): 1.0},
}
# Knobs that move latencies little over their range, so that longer lengthscales are expected.
_STRETCH: Mapping[str, float] = {
    "max_model_len": 8.0,
    "block_size": 2.0,
}
# Of eager mode where the time between tokens is not known.
EAGER = 0.7
_LAUNCHES_MS = 18.0  # what the host takes to launch a step without CUDA graphs, partly while the GPU works
_UNSURE = 3.0  # standard deviation of an expected slope, over the slope
# Standard deviation of what a choice never tried may change, whatever the other knobs have shown.
_DOUBT, _DOUBTS = 0.12, {"enforce_eager": 0.2, "kv_cache_dtype": 0.05}


def eager_effect(tried: Sequence[Observation], itl_limit_ms: float | None) -> float:
    """Logarithm of how much slower eager mode is expected to be, from the least p99 between tokens with graphs.

    Launches matter less the longer a step takes; where tokens come fast, graphs are what makes them so.
    """
    excesses = [o.margins.get("itl_p99_ms", math.inf) for o in tried if o.margins and not o.config.get("enforce_eager")]
    if itl_limit_ms is None or not excesses or not math.isfinite(min(excesses)):
        return EAGER
    with_graphs_ms = max((1 + min(excesses)) * itl_limit_ms, 1.0)
    return math.log(math.hypot(1.0, _LAUNCHES_MS / with_graphs_ms))


def expected(encoding: Encoding, target: str, places: Array, eager: float) -> Array:
    """What each knob adds to the prior mean of ``target`` ("latency", or a constraint). Shape (knobs, places)."""
    parts = np.zeros(places.T.shape)
    slopes, choices = _SLOPES.get(target, {}), _CHOICES.get(target, {})
    for column, knob in enumerate(encoding.space.knobs):
        if encoding.categorical[column]:
            by_choice = np.array([choices.get((knob.name, choice), 0.0) for choice in knob.choices])
            if knob.name == "enforce_eager":
                by_choice *= eager
            parts[column] = by_choice[places[:, column].astype(int)]
        else:
            parts[column] = slopes.get(knob.name, 0.0) * span(knob) * places[:, column]
    return parts


def stretch(encoding: Encoding) -> Array:
    """By how much longer each knob's lengthscale is expected to be. Shape (knobs,)."""
    return np.array([_STRETCH.get(knob.name, 1.0) for knob in encoding.space.knobs])


def doubts(encoding: Encoding) -> Array:
    """Standard deviation of what a choice of each knob may change, before it was tried. Shape (knobs,)."""
    return np.array([_DOUBTS.get(knob.name, _DOUBT) for knob in encoding.space.knobs])


def slopes(encoding: Encoding, target: str) -> Array:
    """Standard deviation of each expected slope over its range: not even the sign is sure. Shape (knobs,)."""
    known = _SLOPES.get(target, {})
    return np.array(
        [
            0.0 if encoding.categorical[column] else _UNSURE * abs(known.get(knob.name, 0.0)) * span(knob)
            for column, knob in enumerate(encoding.space.knobs)
        ]
    )
