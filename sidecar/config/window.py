"""The configuration sections for tuning windows and promotion."""

import math
import re
from datetime import UTC, datetime
from typing import Annotated, Any

from cronsim import CronSim, CronSimError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveFloat,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

# Maximum duration of a window.
LONGEST_WINDOW_S = 7 * 86400


class Section(BaseModel):
    """Common base of all sections: unknown fields are rejected, and values are not coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def parse_duration(text: str) -> float:
    """Seconds of "90s", "45m" or "2h". Raises ValueError."""
    units = {"s": 1, "m": 60, "h": 3600}
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh])", text)
    if match is None:
        raise ValueError('a duration such as "90s", "45m" or "2h" is needed')
    return float(match[1]) * units[match[2]]


def _seconds(given: Any, info: ValidationInfo) -> Any:
    if isinstance(given, str):
        return parse_duration(given)
    # A bare number may have been meant as minutes. In journals of earlier versions (JSON) it is seconds.
    if info.mode == "python" and isinstance(given, int | float) and given:
        return parse_duration(str(given))
    return given


def _text(given: float) -> str:
    return f"{given:.9f}".rstrip("0").rstrip(".") + "s"


def _a_week(given: float) -> float:
    if given > LONGEST_WINDOW_S:
        raise ValueError('"168h" at most, which is a week')
    return given


_FROM_TEXT = BeforeValidator(_seconds)
_AS_TEXT = PlainSerializer(_text, return_type=str, when_used="json")
_IN_SCHEMA = WithJsonSchema(
    {
        "anyOf": [{"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,9})?[smh]$"}, {"const": 0}],
        "examples": ["90s", "45m", "2h"],
    },
    mode="validation",
)


class Probation(Section):
    """When a promotion is rolled back automatically: see sidecar.promote.probation. Durations are in seconds."""

    duration: Annotated[float, Field(ge=0), _FROM_TEXT, _AS_TEXT, _IN_SCHEMA] = 1800.0
    min_requests: Annotated[int, Field(ge=50)] = 200
    burn: Annotated[float, Field(ge=1)] = 6.0
    tolerance: Annotated[float, Field(ge=0)] = 0.25
    crashes: Annotated[int, Field(ge=2)] = 3
    crashes_within: Annotated[PositiveFloat, _FROM_TEXT, _AS_TEXT, _IN_SCHEMA] = 600.0


class Promotion(Section):
    """When a configuration replaces the incumbent: see sidecar.promote.decision for the rule.

    ``pairs`` are the numbers of A/B restarts after which there is an interim analysis. ``min_gain`` is the minimum
    relative gain in the objective; ``tolerance`` is how far one restart of the candidate may exceed a limit, relative
    to it. ``noise`` is the minimum assumed relative run-to-run spread.
    """

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.98
    min_gain: Annotated[float, Field(ge=0, lt=1)] = 0.05
    pairs: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1, strict=False)] = (3, 5, 8, 12, 16)
    slo_confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.9
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    noise: Annotated[float, Field(gt=0, lt=1)] = 0.01
    probation: Probation = Probation()

    @model_validator(mode="after")
    def _ascending(self) -> "Promotion":
        if sorted(set(self.pairs)) != list(self.pairs):
            raise ValueError(f"pairs: each number must be above the one before, got {list(self.pairs)}")
        return self

    @property
    def requests_for_p99(self) -> int:
        """Requests within a limit needed to show, at ``slo_confidence``, that at most 1 in 100 exceeds it."""
        return math.ceil(math.log(1 - self.slo_confidence) / math.log(0.99))

    @property
    def requests_a_start(self) -> int:
        """The minimum per restart, so that the first interim analysis has enough."""
        return math.ceil(self.requests_for_p99 / self.pairs[0])


def _cron(text: str) -> str:
    try:
        CronSim(text, datetime(2026, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        raise ValueError(f'a cron expression such as "0 3 * * 1-5" is needed ({error})') from None
    return text


class Hooks(Section):
    """Commands that announce a window, each a list of words, run without a shell."""

    before_drain: list[str] = []
    after_restore: list[str] = []
    timeout: Annotated[PositiveFloat, _FROM_TEXT, _AS_TEXT, _IN_SCHEMA] = 10.0


class WindowConfig(Section):
    """When `sloguard serve` may take the service down to tune; ``cron`` is in the host's local time."""

    cron: Annotated[str, AfterValidator(_cron)] | None = None
    duration: Annotated[PositiveFloat, _FROM_TEXT, AfterValidator(_a_week), _AS_TEXT, _IN_SCHEMA] = 3600.0
    # Delay between /ready turning not-ready and the drain, for load balancers to notice.
    notice: Annotated[float, Field(ge=0), _FROM_TEXT, _AS_TEXT, _IN_SCHEMA] = 5.0
    # Recent load, in requests per second, above which no window opens.
    max_rate: PositiveFloat | None = None
    # Backoff after a failed window.
    after_failure: Annotated[float, Field(ge=0), _FROM_TEXT, _AS_TEXT, _IN_SCHEMA] = 86400.0
    # How late a window may still open; by default a quarter of its duration.
    latest_start: Annotated[float, Field(ge=0), _FROM_TEXT, _AS_TEXT, _IN_SCHEMA] | None = None
    # Whether a missed window opens as soon as possible.
    make_up: bool = False
    hooks: Hooks = Hooks()

    @property
    def lateness_s(self) -> float:
        """How late a window may open."""
        return self.duration / 4 if self.latest_start is None else min(self.latest_start, self.duration)

    def next_opening(self, now: float) -> float | None:
        """The next due time after ``now``, both in seconds since the epoch; None without ``cron``."""
        if self.cron is None:
            return None
        # In local time, which may be changed before then. An hour that occurs twice counts once.
        walls = CronSim(self.cron, datetime.fromtimestamp(now))
        return next(at for wall in walls if (at := wall.timestamp()) > now)
