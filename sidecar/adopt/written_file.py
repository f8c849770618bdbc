"""Writes the configuration file for a launch, with comments. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sidecar.adopt.launch import AdoptedLaunch
from sidecar.adopt.observed_load import ObservedLoad
from sidecar.config.vllm_arguments import dashed
from vllm_sloguard.guard.rules.human_sizes import as_number
from vllm_sloguard.knobs import KNOBS, Knob, KnobKind

_INPUT, _OUTPUT, _RATE = 512, 128, 4.0
_ALWAYS = ("max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "enable_chunked_prefill")


@dataclass(frozen=True)
class GivenLoad:
    """The rate of the operator, or the load that was observed; neither where both are None."""

    rate: float | None = None
    observed: ObservedLoad | None = None


def written_file(launch: AdoptedLaunch, source: str, load: GivenLoad, *, on_gpu: bool) -> str:
    """The text of the file."""
    parts = [
        _head(launch, source),
        _entry({"model": launch.model}),
        _engine(launch),
        _SLO,
        _workload(launch, load),
        _search(launch, on_gpu=on_gpu),
        _REST,
    ]
    return "\n".join(parts)


def _head(launch: AdoptedLaunch, source: str) -> str:
    lines = [f"Written by `sloguard init` from {source}. Correct slo and workload; then: sloguard plan -c FILE"]
    for name, why in launch.secrets.items():
        lines.append(f"Secret, not in this file: set {name} in the environment of sloguard ({why}).")
    lines += [f"Note: {note}." for note in launch.notes]
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def _entry(content: Mapping[str, Any], indent: int = 0, comment: str = "") -> str:
    lines = (f"{' ' * indent}{name}: {_flow(value)}" for name, value in content.items())
    return "".join(f"{line:<32}  # {comment}\n" if comment else f"{line}\n" for line in lines)


def _flow(value: Any) -> str:
    """A value on one line; in a list, YAML needs no end of document."""
    text = yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=1_000_000, allow_unicode=True)
    return text.strip()[1:-1]


def _engine(launch: AdoptedLaunch) -> str:
    text = "engine:\n"
    if launch.args:
        text += "  args:                         # how vLLM is started today: the first window compares with it\n"
        text += "".join(_entry({dashed(name): value}, 4) for name, value in launch.args.items())
    for name, value in (
        ("host", launch.host),
        ("port", launch.port),
        ("python", launch.python),
        ("drain_timeout_s", launch.drain_timeout_s),
    ):
        if value is not None:
            text += _entry({name: value}, 2)
    if launch.env:
        text += _entry({"env": dict(launch.env)}, 2)
    return text if text != "engine:\n" else "engine: {}\n"


_SLO = """\
slo:                              # an example: write what your users need
  ttft_p99_ms: 500                # time to the first token, 99th percentile, in milliseconds
  itl_p99_ms: 50                  # between two tokens, in milliseconds
  error_rate: 0.01                # at most 1% of the requests may fail

objective: latency                # or goodput, or capacity
"""

_REST = """\
window:
  # cron: "0 3 * * 1-5"           # when a window may open, in local time; without it, only by `sloguard retune --now`
  duration: 60m                   # vLLM is down for it at most

state: sloguard-state             # a folder for the journal
"""


def _workload(launch: AdoptedLaunch, load: GivenLoad) -> str:
    seen = load.observed
    if load.rate is not None:
        rate, why = load.rate, "requests per second, from --rate"
    elif seen is not None:
        hours = f"{seen.requests:,} requests in {seen.seconds / 3600:.1f} h"
        rate, why = seen.rate, f"requests per second, the mean of {hours}; write that of your busiest hour"
    else:
        rate, why = _RATE, "requests per second: an example, write that of your busiest hour"
    longest = as_number("max_model_len", launch.args.get("max_model_len", 0))
    longest = longest if isinstance(longest, int) and longest > 0 else 0
    asked, answered = (seen.input_tokens or _INPUT, seen.output_tokens or _OUTPUT) if seen else (_INPUT, _OUTPUT)
    if longest and asked + answered > longest * 0.6:
        scale = longest * 0.6 / (asked + answered)
        asked, answered = max(1, int(asked * scale)), max(1, int(answered * scale))
    origin = "the mean that was observed" if seen else "tokens of a prompt, on average"
    return (
        "workload:\n"
        + f"{f'  rate: {rate:.4g}':<32}  # {why}\n"
        + _entry({"input_tokens": asked}, 2, origin)
        + _entry({"output_tokens": answered}, 2, "tokens of an answer, on average")
        + _entry({"spread": 0.5}, 2, "lengths vary by half of their mean")
    )


def _search(launch: AdoptedLaunch, *, on_gpu: bool) -> str:
    text = "search:\n  budget: 15                      # trials in a window\n"
    text += "  knobs:                          # what may change; docs/knobs.md lists all\n"
    return text + "".join(_knob(KNOBS[name], launch.args.get(name)) for name in _knobs(launch, on_gpu=on_gpu))


def _knobs(launch: AdoptedLaunch, *, on_gpu: bool) -> Iterable[str]:
    yield from _ALWAYS
    if on_gpu and "kv_cache_memory_bytes" not in launch.args:
        yield "gpu_memory_utilization"


def _knob(knob: Knob, current: object) -> str:
    """A range that includes the current value."""
    value = as_number(knob.name, current) if isinstance(current, str) else current
    if knob.kind is KnobKind.CATEGORICAL:
        return f"    {knob.name}:\n"
    low, high = knob.low, knob.high
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = min(low, value), max(high, value)
    return f"    {knob.name}: {{low: {_figure(low)}, high: {_figure(high)}}}\n"


def _figure(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"
