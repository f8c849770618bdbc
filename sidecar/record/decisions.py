"""A run's decision and a promotion's evidence, as stored in the journal."""

import json
from enum import StrEnum
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sidecar.config.schema import Objective, Slo, Workload
from sidecar.config.window import Promotion
from sidecar.record.row_validation import JournalError, object_of, problem

_FROZEN = ConfigDict(ser_json_inf_nan="strings", extra="ignore", allow_inf_nan=True)
_Section = TypeVar("_Section", bound=BaseModel)


class Outcome(StrEnum):
    """How a run ended; sidecar.record.wording has the display texts."""

    PROMOTED = "promoted"
    KEPT = "kept"
    WORSE = "worse"
    INCONCLUSIVE = "inconclusive"
    INTERRUPTED = "interrupted"  # cut off before it could decide
    ABANDONED = "abandoned"  # the configuration changed during the run


# Outcomes of completed runs.
DECIDED = (Outcome.PROMOTED, Outcome.KEPT, Outcome.WORSE, Outcome.INCONCLUSIVE)

# Journals of version 0.1 store sentences.
_FORMER = {"kept (no clear winner)": Outcome.KEPT, "kept (worse)": Outcome.WORSE}


def outcome_of(text: str) -> Outcome:
    """Parses an outcome from a journal of any version. Raises ValueError."""
    return _FORMER.get(text) or Outcome(text)


def _from_journal(given: object) -> object:
    return _FORMER.get(given, given) if isinstance(given, str) else given


@dataclass(frozen=True, config=_FROZEN)
class NearestMiss:
    """The trial with the smallest violation, the limit that it missed by most, and by which share of the limit.

    ``estimated``: its load was stopped early, so ``excess`` is an estimate. ``highest_rate`` is the highest request
    rate, per second, at which its configuration met the SLO, and ``lowest_missed`` the lowest at which it did not; None
    if unknown.
    """

    trial: int
    limit: str
    excess: float
    estimated: bool = False
    highest_rate: float | None = None
    lowest_missed: float | None = None

    def __str__(self) -> str:
        about = "about " if self.estimated else ""
        return f"trial {self.trial} came nearest and exceeds {self.limit} by {about}{self.excess:.0%}{self.rates}"

    @property
    def rates(self) -> str:
        """What is known about lower request rates, to append; empty if nothing is."""
        if self.highest_rate is not None:
            return f"; it meets the SLO at {self.highest_rate:.3g} requests/s"
        return f"; it misses the SLO at {self.lowest_missed:.3g} requests/s too" if self.lowest_missed else ""


@dataclass(frozen=True, config=_FROZEN)
class Decision:
    """The outcome, its reason and figures; ``trial`` is the number of the trial whose configuration is promoted.

    ``gain`` is the relative gain of the objective, between ``low`` and ``high``; ``noise`` is the run-to-run spread,
    relative. ``incumbents`` and ``candidates`` are the trials that were compared. ``nearest_miss`` is set if no
    configuration met the SLO.
    """

    outcome: Annotated[Outcome, BeforeValidator(_from_journal)]
    reason: str
    trial: int = 0
    gain: float | None = None
    p_value: float | None = None
    low: float | None = None
    high: float | None = None
    noise: float | None = None
    pairs: int = 0
    incumbents: tuple[int, ...] = ()
    candidates: tuple[int, ...] = ()
    nearest_miss: NearestMiss | None = None


def _known_fields(section: type[_Section]) -> BeforeValidator:
    """Reads a section of the configuration, ignoring fields of other versions."""

    def read(given: object) -> object:
        if not isinstance(given, dict):
            return given
        known = {name: value for name, value in given.items() if name in section.model_fields}  # pyright: ignore[reportUnknownVariableType]
        return section.model_validate_json(json.dumps(known))

    return BeforeValidator(read)


@dataclass(frozen=True, config=_FROZEN)
class Provenance:
    """Where and with which versions a decision was measured; ``vllm`` is the version that the engines reported."""

    sloguard: str
    vllm: str
    device: str
    driver: str | None
    model: str
    model_config_sha256: str | None
    objective: Objective
    slo: Annotated[Slo, _known_fields(Slo)]
    workload: Annotated[Workload, _known_fields(Workload)]
    promotion: Annotated[Promotion, _known_fields(Promotion)]


@dataclass(frozen=True)
class Evidence:
    """The evidence for a promotion."""

    decision: Decision
    provenance: Provenance


_DECISION = TypeAdapter(Decision)
_PROVENANCE = TypeAdapter(Provenance)


def decision_as_json(decision: Decision) -> dict[str, Any]:
    """The JSON form used by the journal and ``--json``."""
    return _DECISION.dump_python(decision, mode="json")


def read_decision(text: str, name: str = "decision") -> Decision:
    """Parses a decision from a journal of any version. Raises JournalError."""
    try:
        return _DECISION.validate_python(object_of(text, name))
    except (ValidationError, OverflowError) as error:
        detail = problem(error) if isinstance(error, ValidationError) else str(error)
        raise JournalError(f"the journal is damaged: {name}: {detail}") from None


def evidence_as_json(evidence: Evidence) -> dict[str, Any]:
    """The flat JSON object used by the journal and ``--json``."""
    provenance = _PROVENANCE.dump_python(evidence.provenance, mode="json")
    for name in ("slo", "workload"):
        provenance[name] = {key: value for key, value in provenance[name].items() if value is not None}
    return {**decision_as_json(evidence.decision), **provenance}


def read_evidence(text: str) -> Evidence:
    """Parses evidence from a journal of any version. Raises JournalError."""
    content = object_of(text, "evidence")
    try:
        return Evidence(read_decision(text, "evidence"), _PROVENANCE.validate_python(content))
    except ValidationError as error:
        raise JournalError(f"the journal is damaged: evidence: {problem(error)}") from None
