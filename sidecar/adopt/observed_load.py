"""The load of an engine from its own /metrics: the rate and the lengths since it started. Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from sidecar.adopt.launch import NotReadable

_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{[^}]*\})?\s+(\S+)", re.MULTILINE)
_LEAST_S = 60.0


@dataclass(frozen=True)
class ObservedLoad:
    """Requests per second over ``seconds``, and mean lengths in tokens."""

    rate: float
    requests: int
    seconds: float
    input_tokens: int
    output_tokens: int


def observed_load(page: str, now: float) -> ObservedLoad:
    """What the page of /metrics says; ``now`` in seconds since the epoch. Raises NotReadable."""
    sums: dict[str, float] = {}
    for name, text in _SAMPLE.findall(page):
        try:
            sums[name] = sums.get(name, 0.0) + float(text)
        except ValueError:
            continue
    served = sums.get("vllm:request_success_total")
    if served is None:
        raise NotReadable("no vllm:request_success_total in it; is it vLLM's own /metrics?")
    since = _first(sums, ("process_start_time_seconds", "vllm:request_success_created"))
    seconds = now - since if since else 0.0
    if served < 1 or seconds < _LEAST_S:
        raise NotReadable(f"{served:.0f} requests in {max(seconds, 0):.0f} s are too few for a rate; use --rate")
    return ObservedLoad(
        rate=served / seconds,
        requests=int(served),
        seconds=seconds,
        input_tokens=_mean(sums, "vllm:request_prompt_tokens"),
        output_tokens=_mean(sums, "vllm:request_generation_tokens"),
    )


def _first(sums: dict[str, float], names: Iterable[str]) -> float:
    return next((sums[name] for name in names if sums.get(name)), 0.0)


def _mean(sums: dict[str, float], name: str) -> int:
    count = sums.get(f"{name}_count", 0.0)
    return max(1, round(sums.get(f"{name}_sum", 0.0) / count)) if count else 0
