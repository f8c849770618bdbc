"""Values that are allowed, but probably meant in another unit or not meant at all: each is a warning. Pure."""

from collections.abc import Iterator

from sidecar.config.engine_section import EngineConfig
from sidecar.config.mistakes import Mistake
from sidecar.config.search_section import SearchConfig
from sidecar.config.slo import LatencyKind, Slo
from sidecar.config.vllm_arguments import dashed
from sidecar.config.window import WindowConfig
from sidecar.config.workload_section import Workload
from vllm_sloguard.knobs import KnobKind

# Below this, in milliseconds, no engine meets a limit: a forward pass of the smallest model takes about as long.
_MIN_MS = {LatencyKind.TTFT: 5.0, LatencyKind.ITL: 1.0, LatencyKind.TPOT: 1.0, LatencyKind.E2E: 10.0}
_MAX_FAILING = 0.2
_MIN_GOODPUT = 0.5
_MIN_KV_BYTES = 2**20
_LONGEST_DRAIN_S = 3600
_LONGEST_REQUEST_S = 7200
_SHORTEST_START_S = 10
_SHORTEST_WINDOW_S = 60
_HIGHEST_RATE = 10_000


def suspicious_values(
    slo: Slo, engine: EngineConfig, workload: Workload, window: WindowConfig, search: SearchConfig
) -> list[Mistake]:
    """What to warn of, in the order of the sections."""
    return [*_limits(slo), *_engine(engine), *_load(workload), *_window(window), *_outside_ranges(search, engine)]


def _limits(slo: Slo) -> Iterator[Mistake]:
    for limit in slo.latency_limits:
        if limit.limit_ms < _MIN_MS[limit.kind]:
            meant = f"`{limit.name}: {limit.limit_ms * 1000:g}`"
            text = f"{limit.limit_ms:g} ms is less than one forward pass takes; if seconds were meant, write {meant}"
            yield Mistake(("slo", limit.name), text)
    if slo.error_rate > _MAX_FAILING:
        text = f"{slo.error_rate:.0%} of the requests may fail; it is a share, so 1% is `error_rate: 0.01`"
        yield Mistake(("slo", "error_rate"), text)
    if slo.goodput is not None and slo.goodput < _MIN_GOODPUT:
        text = f"only {slo.goodput:.0%} of the requests need to meet the limits; 99% is `goodput: 0.99`"
        yield Mistake(("slo", "goodput"), text)


def _engine(engine: EngineConfig) -> Iterator[Mistake]:
    place = ("engine", "args")
    share = engine.args.get("gpu_memory_utilization")
    if isinstance(share, int | float) and not isinstance(share, bool) and share > 1:
        text = f"{share:g} is more than the whole GPU; it is a share, so 90% is `gpu-memory-utilization: 0.9`"
        yield Mistake((*place, "gpu_memory_utilization"), text)
    kv_bytes = engine.args.get("kv_cache_memory_bytes")
    if isinstance(kv_bytes, int | float) and 0 < kv_bytes < _MIN_KV_BYTES:
        text = f"{kv_bytes} bytes hold no request; 4 GiB is `kv-cache-memory-bytes: 4G`"
        yield Mistake((*place, "kv_cache_memory_bytes"), text)
    if engine.drain_timeout_s > _LONGEST_DRAIN_S:
        text = f"{engine.drain_timeout_s:,} s is more than an hour; it is in seconds: `drain_timeout_s: 30`"
        yield Mistake(("engine", "drain_timeout_s"), text)
    if engine.start_timeout_s < _SHORTEST_START_S:
        text = f"vLLM does not start within {engine.start_timeout_s:g} s; it is in seconds: `start_timeout_s: 900`"
        yield Mistake(("engine", "start_timeout_s"), text)


def _load(workload: Workload) -> Iterator[Mistake]:
    if workload.rate > _HIGHEST_RATE:
        text = f"{workload.rate:,g} requests per second; divide a rate per minute by 60: `rate: {workload.rate / 60:g}`"
        yield Mistake(("workload", "rate"), text)
    if workload.request_timeout_s > _LONGEST_REQUEST_S:
        text = f"{workload.request_timeout_s:,g} s; it is in seconds: `request_timeout_s: 60`"
        yield Mistake(("workload", "request_timeout_s"), text)


def _window(window: WindowConfig) -> Iterator[Mistake]:
    if window.duration < _SHORTEST_WINDOW_S:
        text = f"{window.duration:g} s is too short for a start of vLLM; `duration: 45m` is 45 minutes"
        yield Mistake(("window", "duration"), text)


def _outside_ranges(search: SearchConfig, engine: EngineConfig) -> Iterator[Mistake]:
    for knob in search.space_knobs():
        value = engine.args.get(knob.name)
        if value is None or isinstance(value, list | str) or knob.holds(value):
            continue
        given = f"{dashed(knob.name)} of the current configuration, {value},"
        if knob.kind is KnobKind.CATEGORICAL:
            choices = ", ".join(str(choice).lower() for choice in (*knob.choices, value))
            text = f"{given} is not among the choices; include it: `choices: [{choices}]`"
        else:
            low, high = min(knob.low, value), max(knob.high, value)
            text = (
                f"{given} is outside the range {knob.low:g} to {knob.high:g}, so the search can't stay near it;"
                f" include it: `{knob.name}: {{low: {low:g}, high: {high:g}}}`"
            )
        yield Mistake(("search", "knobs", knob.name), text)
