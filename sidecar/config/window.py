"""The sections of the operator's file that say when a window opens, and what is promoted in it."""

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
    model_validator,
)

# Of a window.
LONGEST_WINDOW_S = 7 * 86400


class Section(BaseModel):
    """What all sections have in common: no other fields than these, and no value is bent to its type."""

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
    # A bare number may have been meant as minutes. In journals of earlier versions, which are JSON, it is seconds.
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


class Probation(Section):
    """When a promotion is taken back by itself: see docs of sidecar.promote.probation. Durations are seconds."""

    duration: Annotated[float, Field(ge=0), _FROM_TEXT, _AS_TEXT] = 1800.0
    min_requests: Annotated[int, Field(ge=50)] = 200
    burn: Annotated[float, Field(ge=1)] = 6.0
    tolerance: Annotated[float, Field(ge=0)] = 0.25
    crashes: Annotated[int, Field(ge=2)] = 3
    crashes_within: Annotated[PositiveFloat, _FROM_TEXT, _AS_TEXT] = 600.0


class Promotion(Section):
    """When a configuration replaces the incumbent: see sidecar.promote.decision for the rule.

    ``pairs`` are the numbers of pairs of starts after which there is an interim analysis. ``min_gain`` is of the
    objective, relative; ``tolerance`` is how far one start of the candidate may exceed a limit, relative to it.
    ``noise`` is the least that starts of one configuration are taken to deviate, relative.
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
        """So many requests within a limit show, at ``slo_confidence``, that at most 1 in 100 is beyond it."""
        return math.ceil(math.log(1 - self.slo_confidence) / math.log(0.99))

    @property
    def requests_a_start(self) -> int:
        """The fewest that a start is loaded with, for enough of them by the first look."""
        return math.ceil(self.requests_for_p99 / self.pairs[0])


def _cron(text: str) -> str:
    try:
        CronSim(text, datetime(2026, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        raise ValueError(f'a cron expression such as "0 3 * * 1-5" is needed ({error})') from None
    return text


class Hooks(Section):
    """Commands, each a list of words and never for a shell, by which others are told of a window."""

    before_drain: list[str] = []
    after_restore: list[str] = []
    timeout: Annotated[PositiveFloat, _FROM_TEXT, _AS_TEXT] = 10.0


class WindowConfig(Section):
    """When `sloguard serve` may take the service down to tune; ``cron`` is in the host's local time."""

    cron: Annotated[str, AfterValidator(_cron)] | None = None
    duration: Annotated[PositiveFloat, _FROM_TEXT, AfterValidator(_a_week), _AS_TEXT] = 3600.0
    # Between /ready turning not-ready and the drain: time for load balancers to see it.
    notice: Annotated[float, Field(ge=0), _FROM_TEXT, _AS_TEXT] = 5.0
    # Requests a second of the last minutes; none opens above it.
    max_rate: PositiveFloat | None = None
    # How long none opens after one that has failed.
    after_failure: Annotated[float, Field(ge=0), _FROM_TEXT, _AS_TEXT] = 86400.0
    # How late a window may still open; a quarter of its duration unless given.
    latest_start: Annotated[float, Field(ge=0), _FROM_TEXT, _AS_TEXT] | None = None
    # Whether a window that was missed opens as soon as it can.
    make_up: bool = False
    hooks: Hooks = Hooks()

    @property
    def lateness_s(self) -> float:
        """How late a window may open."""
        return self.duration / 4 if self.latest_start is None else min(self.latest_start, self.duration)

    def next_opening(self, now: float) -> float | None:
        """When the next one is due after ``now``, both seconds since the epoch; None without ``cron``."""
        if self.cron is None:
            return None
        # By the clock on the wall, which may change before then. The hour that it shows twice counts once.
        walls = CronSim(self.cron, datetime.fromtimestamp(now))
        return next(at for wall in walls if (at := wall.timestamp()) > now)
