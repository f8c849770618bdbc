"""Messages between the sidecar and its load generator: one JSON object per line, each of one of these types.

The sidecar sends RunLoad and EndLoad. The generator sends Ready once, LoadDelta while a load runs, and LoadReport or
LoadFailure at its end. Times are seconds on the generator's own clock. Pure, and free of heavy imports: in vLLM's
environment ``command_from_json`` parses the messages, in the sidecar pydantic validates them.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, cast

# Upper bound of times, ages and gaps.
_LONGEST_S = 1e9


def _check_bounds(*seconds: float | None) -> None:
    if not all(value is None or -_LONGEST_S < value < _LONGEST_S for value in seconds):
        raise ValueError("a time is not a number of seconds")


class End(StrEnum):
    """How a load is ended before its last request is sent."""

    ENOUGH = "enough"  # stop sending; requests in flight may finish
    STOP = "stop"  # cancel requests in flight


@dataclass(frozen=True)
class RunLoad:
    """Send one load. ``argv`` is for ``vllm bench serve``; its ``--num-prompts`` counts measured requests."""

    argv: tuple[str, ...]
    request_timeout_s: float
    warmup_requests: int
    type: Literal["run"] = "run"


@dataclass(frozen=True)
class EndLoad:
    """End the running load."""

    how: End
    type: Literal["end"] = "end"


@dataclass(frozen=True)
class Ready:
    """The generator has finished its imports."""

    type: Literal["ready"] = "ready"


@dataclass(frozen=True)
class RequestResult:
    """One request as seen by the client, in seconds; None if not observed. ``error`` is empty for a success.

    ``intended_s`` is its time in the arrival process, ``start_s`` when it was sent; both may be unknown.
    """

    ttft_s: float | None
    e2e_s: float | None
    itls_s: tuple[float, ...]
    error: str = ""
    start_s: float | None = None
    intended_s: float | None = None

    def __post_init__(self) -> None:
        _check_bounds(self.ttft_s, self.e2e_s, self.start_s, self.intended_s)
        # There may be thousands of gaps: their sum is NaN or infinite if one of them is.
        if self.itls_s:
            _check_bounds(sum(self.itls_s), min(self.itls_s), max(self.itls_s))


@dataclass(frozen=True)
class InFlight:
    """A request in flight; ``ttft_s`` is None until its first token."""

    start_s: float
    ttft_s: float | None

    def __post_init__(self) -> None:
        _check_bounds(self.start_s, self.ttft_s)


@dataclass(frozen=True)
class WarmUp:
    """The warm-up before a load: its requests, and whether step times settled before the bound was reached."""

    requests: int = 0
    seconds: float = 0.0
    settled: bool = True

    def __post_init__(self) -> None:
        _check_bounds(self.seconds)


@dataclass(frozen=True)
class LoadDelta:
    """Progress at ``now_s`` of a load of ``planned`` measured requests (0 while it is being prepared)."""

    now_s: float
    planned: int
    finished: tuple[RequestResult, ...]
    in_flight: tuple[InFlight, ...]
    type: Literal["delta"] = "delta"

    def __post_init__(self) -> None:
        _check_bounds(self.now_s)


@dataclass(frozen=True)
class LoadReport:
    """All finished measured requests of a load; ``cancelled`` counts those in flight when it was stopped.

    ``duration_s`` is from the first request sent to the last one that ended.
    """

    requests: tuple[RequestResult, ...]
    duration_s: float
    planned: int
    cancelled: int = 0
    warm_up: WarmUp = WarmUp()
    type: Literal["report"] = "report"

    def __post_init__(self) -> None:
        _check_bounds(self.duration_s)


@dataclass(frozen=True)
class LoadFailure:
    """The benchmark itself failed."""

    error: str
    type: Literal["failure"] = "failure"


GeneratorCommand = RunLoad | EndLoad
GeneratorMessage = Ready | LoadDelta | LoadReport | LoadFailure


def message_line(message: GeneratorCommand | GeneratorMessage) -> str:
    """One line."""
    # Field by field through ``default``: dataclasses.asdict copies every gap, which would delay a running load.
    return json.dumps(message, default=_plain)


def command_from_json(line: str) -> GeneratorCommand:
    """Decodes a command of the sidecar. Raises ValueError, LookupError or TypeError for anything else."""
    content = json.loads(line)
    match content["type"]:
        case "run":
            argv = tuple(str(word) for word in content["argv"])
            return RunLoad(argv, float(content["request_timeout_s"]), int(content["warmup_requests"]))
        case "end":
            return EndLoad(End(content["how"]))
        case other:
            raise ValueError(f"there is no command {other!r}")


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return cast("dict[str, Any]", vars(value))
    return float(value)
