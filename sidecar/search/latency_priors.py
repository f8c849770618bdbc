"""Prior knowledge of how each vLLM knob affects latency, before anything is measured.

The numbers are changes in log latency: per factor of e for a numeric knob (from 0 to 1 for a share), and relative to
the other choices for a categorical one. Those of eager mode are multiples of ``eager_effect``.
They form a prior mean that measurements override. Signs and sizes follow measurements on an H200 (vLLM 0.26): eager
mode takes 14.7 ms per token against 2.0 with CUDA graphs, and eight tokens in one piece 122 ms; too few sequences queue
for seconds.
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
# Knobs with little effect on latency over their range get longer prior lengthscales.
_STRETCH: Mapping[str, float] = {
    "max_model_len": 8.0,
    "block_size": 2.0,
}
# Eager mode's effect when ITL is unknown.
EAGER = 0.7
_LAUNCHES_MS = 18.0  # host time to launch a step without CUDA graphs, partly overlapped with the GPU
_UNSURE = 3.0  # standard deviation of a prior slope, relative to the slope
# Standard deviation of the effect of an untried choice, whatever the other knobs have shown.
_DOUBT, _DOUBTS = 0.12, {"enforce_eager": 0.2, "kv_cache_dtype": 0.05}


def eager_effect(tried: Sequence[Observation], itl_limit_ms: float | None) -> float:
    """Expected log slowdown of eager mode, from the lowest p99 ITL measured with CUDA graphs.

    Launch overhead matters less for longer steps; where tokens come fast, CUDA graphs are the reason.
    """
    excesses = [o.margins.get("itl_p99_ms", math.inf) for o in tried if o.margins and not o.config.get("enforce_eager")]
    if itl_limit_ms is None or not excesses or not math.isfinite(min(excesses)):
        return EAGER
    with_graphs_ms = max((1 + min(excesses)) * itl_limit_ms, 1.0)
    return math.log(math.hypot(1.0, _LAUNCHES_MS / with_graphs_ms))


def expected(encoding: Encoding, target: str, places: Array, eager: float) -> Array:
    """Each knob's contribution to the prior mean of ``target`` ("latency" or a constraint). Shape (knobs, places)."""
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
    """Prior multiplier of each knob's lengthscale. Shape (knobs,)."""
    return np.array([_STRETCH.get(knob.name, 1.0) for knob in encoding.space.knobs])


def doubts(encoding: Encoding) -> Array:
    """Standard deviation of the effect of an untried choice, per knob. Shape (knobs,)."""
    return np.array([_DOUBTS.get(knob.name, _DOUBT) for knob in encoding.space.knobs])


def slopes(encoding: Encoding, target: str) -> Array:
    """Standard deviation of each prior slope over its range; even the sign is uncertain. Shape (knobs,)."""
    known = _SLOPES.get(target, {})
    return np.array(
        [
            0.0 if encoding.categorical[column] else _UNSURE * abs(known.get(knob.name, 0.0)) * span(knob)
            for column, knob in enumerate(encoding.space.knobs)
        ]
    )
