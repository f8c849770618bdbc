"""A vLLM service on a shared card as a landscape: start-up rules, memory, then the load of engine_model.

The crashes are those of vLLM 0.26 on an H200 and in vLLM's sources: fewer batched tokens than sequences, or than the
longest request without chunked prefill; a share that is not free; no memory left for the cache, or too little for one
request; and, under load, a neighbour that takes memory the engine had claimed. Start costs were measured there too: 68
s with CUDA graphs, 42 s eager, 12 s for a validation error, 25 to 40 s for memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from engine_model import Answer, Load, Settings, Speed, serve

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU and its neighbour process. ``growth_gib`` is the neighbour's additional memory under load."""

    total_gib: float
    bandwidth_gbs: float
    tflops: float  # achieved in prefill
    tenant_gib: float = 0.4
    growth_gib: tuple[float, float] = (0.0, 0.0)
    jitter_gib: float = 0.1  # of the neighbour between two starts


@dataclass(frozen=True)
class Model:
    """A model on the card; ``activation_bytes`` are those of one batched token at the widest layer."""

    weights_gib: float
    parameters: float
    layers: int
    hidden: int
    kv_bytes_per_token: int
    activation_bytes: int
    overhead_gib: float = 0.4  # measured on the H200
    graph_gib: float = 0.35  # taken after the profile, beside the share


@dataclass(frozen=True)
class Noise:
    """Run-to-run noise (a factor on every step) and, rarely, a straggler that is far slower."""

    step: float = 0.015
    straggler_share: float = 0.0
    straggler: tuple[float, float] = (1.2, 1.6)


def speed_of(model: Model, card: Card) -> Speed:
    """Step times from the card's bandwidth and compute.

    The constants are those of Qwen2-1.5B on an H200: 1.15 ms plus reading the weights per step with CUDA graphs, 13.5
    ms for 28 layers without, 55 us per sequence, 171 TFLOPS. Assuming 6 s of arrivals per load (the number of requests
    is unknown), p50 and p99 of TTFT and ITL of the six bf16 loads of the measured table are reproduced within a factor
    of 2.1, and 18 of the 24 within 1.5; only TTFT's p99 at 32 requests/s is 4 times too low.
    """
    read_ms = model.weights_gib * GIB / card.bandwidth_gbs / 1e6
    attended = 2 * model.parameters / (4 * model.layers * model.hidden)
    return Speed(
        graph_ms=1.15 + read_ms,
        eager_ms=max(13.5 * model.layers / 28, 1.15 + read_ms),
        sequence_us=55.0,
        token_us=2 * model.parameters / card.tflops / 1e6,
        context_us=model.kv_bytes_per_token / card.bandwidth_gbs,
        frontend_ms=6.0,
        attention_tokens=attended,
    )


@dataclass(frozen=True)
class Crash:
    """A failed start or load. The kinds are those of the study."""

    kind: str
    cost_s: float


@dataclass(frozen=True)
class Service:
    """One landscape. The subclasses state what they are scaled from."""

    card: Card
    model: Model
    load: Load
    limits: Mapping[str, float]
    knobs: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    needed_len: int
    best_ms: float
    noise: Noise = Noise()
    start_s: float = 0.0  # on top of the measured model's, for more weights

    def space(self) -> Mapping[str, Mapping[str, Any]]:
        """The knobs."""
        return self.knobs

    def host(self) -> dict[str, float]:
        """The guard's view before a start: the neighbour as it is then."""
        return {
            "gpu_total_gib": self.card.total_gib,
            "gpu_free_gib": self.card.total_gib - self.card.tenant_gib,
            "weights_gib": self.model.weights_gib,
            "kv_bytes_per_token": self.model.kv_bytes_per_token,
            "max_len_needed": self.needed_len,
        }

    def slo(self) -> Mapping[str, float]:
        """The limits."""
        return self.limits

    def incumbent(self) -> Mapping[str, Any]:
        """The current configuration."""
        return self.defaults

    def best_known(self) -> float:
        """The lowest mean latency found by best_known.py."""
        return self.best_ms

    def serve(self, config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """One trial, request by request."""
        noises = rng.random(4)
        crash = self.refused(config) or self.starved(config, noises)
        if crash is not None:
            return {"crash": {"kind": crash.kind, "phase": "startup"}, "start_s": crash.cost_s, "requests": []}
        start_s = self.start_s + (42.0 if config.get("enforce_eager") else 68.0) * (0.95 + 0.1 * float(noises[3]))
        served = serve(self.load, self.settings(config, rng), self.speed(config), rng)
        requests = [_as_listed(answer) for answer in served.requests]
        if self.outgrown(config, noises):
            half = [r for r in requests if r["start_s"] <= served.duration_s / 2]
            return {"crash": {"kind": "oom", "phase": "serving"}, "start_s": start_s, "requests": half}
        return {"crash": None, "start_s": start_s, "planned": self.load.requests, "requests": requests}

    def refused(self, config: Mapping[str, Any]) -> Crash | None:
        """What vLLM refuses before loading anything."""
        seqs, batch = int(config["max_num_seqs"]), int(config["max_num_batched_tokens"])
        whole = not config.get("enable_chunked_prefill", True)
        if batch < seqs or (whole and batch < int(config["max_model_len"])):
            return Crash("startup", 12.0)
        return None

    def starved(self, config: Mapping[str, Any], noises: np.ndarray) -> Crash | None:
        """Failures for lack of memory before the first request."""
        jitter = self.card.jitter_gib * (2 * float(noises[0]) - 1)
        if self.claimed_gib(config) > self.card.total_gib - self.card.tenant_gib + jitter:
            return Crash("oom", 25.0)
        kv_gib = self.kv_gib(config)
        if kv_gib <= 0:
            return Crash("oom", 35.0 + self.start_s)
        if int(config["max_model_len"]) * self.kv_bytes(config) > kv_gib * GIB:
            return Crash("startup", 38.0 + self.start_s)
        return None

    def outgrown(self, config: Mapping[str, Any], noises: np.ndarray) -> bool:
        """Whether, by the end of the load, the neighbour has taken memory that the engine needs."""
        low, high = self.card.growth_gib
        # Two draws: the neighbour mostly grows about halfway.
        grown = low + (high - low) * float(noises[1] + noises[2]) / 2
        graphs = 0.0 if config.get("enforce_eager") else self.model.graph_gib
        return self.claimed_gib(config) + graphs > self.card.total_gib - self.card.tenant_gib - grown

    def claimed_gib(self, config: Mapping[str, Any]) -> float:
        """The memory that vLLM requests."""
        return float(config["gpu_memory_utilization"]) * self.card.total_gib

    def kv_gib(self, config: Mapping[str, Any]) -> float:
        """The remainder for the KV cache."""
        activation = int(config["max_num_batched_tokens"]) * self.model.activation_bytes / GIB
        return self.claimed_gib(config) - self.model.weights_gib - activation - self.model.overhead_gib

    def kv_bytes(self, config: Mapping[str, Any]) -> float:
        """Of one token."""
        return self.model.kv_bytes_per_token / (2 if config.get("kv_cache_dtype") == "fp8" else 1)

    def settings(self, config: Mapping[str, Any], rng: np.random.Generator) -> Settings:
        """The engine's settings, with the noise of this start."""
        slower = float(np.exp(rng.normal(0.0, self.noise.step)))
        if rng.random() < self.noise.straggler_share:
            slower *= float(rng.uniform(*self.noise.straggler))
        return Settings(
            seqs=int(config["max_num_seqs"]),
            batch=int(config["max_num_batched_tokens"]),
            kv_tokens=self.kv_gib(config) * GIB / self.kv_bytes(config),
            max_len=int(config["max_model_len"]),
            eager=bool(config.get("enforce_eager", False)),
            chunked=bool(config.get("enable_chunked_prefill", True)),
            prefix_caching=bool(config.get("enable_prefix_caching", True)),
            long_prefill=int(config.get("long_prefill_token_threshold", 0)),
            stream_interval=int(config.get("stream_interval", 1)),
            block=int(config.get("block_size", 16)),
            slower=slower,
        )

    def speed(self, config: Mapping[str, Any]) -> Speed:
        """An 8-bit cache is read in half the time, but must be converted."""
        speed = speed_of(self.model, self.card)
        if config.get("kv_cache_dtype") != "fp8":
            return speed
        return replace(speed, context_us=0.6 * speed.context_us, token_us=1.04 * speed.token_us)


def _as_listed(answer: Answer) -> dict[str, Any]:
    failed = answer.e2e_s is None
    return {
        "start_s": answer.start_s,
        "ttft_s": answer.ttft_s,
        "e2e_s": answer.e2e_s,
        "itls_s": answer.itls_s,
        "error": "rejected: longer than max_model_len" if failed else None,
    }
