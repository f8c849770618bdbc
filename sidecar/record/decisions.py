"""How a tuning run ended, and what a promotion rests on, as the journal keeps them."""

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
    """How a run ended; sidecar.record.wording has the words."""

    PROMOTED = "promoted"
    KEPT = "kept"
    WORSE = "worse"
    INCONCLUSIVE = "inconclusive"
    INTERRUPTED = "interrupted"  # cut off before it could decide
    ABANDONED = "abandoned"  # the configuration was changed meanwhile


# Those of a run that came to its end.
DECIDED = (Outcome.PROMOTED, Outcome.KEPT, Outcome.WORSE, Outcome.INCONCLUSIVE)

# Journals of version 0.1 have sentences instead.
_FORMER = {"kept (no clear winner)": Outcome.KEPT, "kept (worse)": Outcome.WORSE}


def outcome_of(text: str) -> Outcome:
    """The outcome that a journal of any version names. Raises ValueError."""
    return _FORMER.get(text) or Outcome(text)


def _from_journal(given: object) -> object:
    return _FORMER.get(given, given) if isinstance(given, str) else given


@dataclass(frozen=True, config=_FROZEN)
class Decision:
    """The outcome, why, and its figures; ``trial`` is the number of the trial whose configuration is to serve.

    ``gain`` is the relative gain of the objective, between ``low`` and ``high``; ``noise`` is the run-to-run spread,
    relative. ``incumbents`` and ``candidates`` are the trials that were compared.
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


def _known_fields(section: type[_Section]) -> BeforeValidator:
    """Reads a section of the configuration without the fields that only another version has."""

    def read(given: object) -> object:
        if not isinstance(given, dict):
            return given
        known = {name: value for name, value in given.items() if name in section.model_fields}  # pyright: ignore[reportUnknownVariableType]
        return section.model_validate_json(json.dumps(known))

    return BeforeValidator(read)


@dataclass(frozen=True, config=_FROZEN)
class Provenance:
    """Where a decision was measured, and with what; ``vllm`` is the version that the engines reported."""

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
    """What a promotion rests on."""

    decision: Decision
    provenance: Provenance


_DECISION = TypeAdapter(Decision)
_PROVENANCE = TypeAdapter(Provenance)


def decision_as_json(decision: Decision) -> dict[str, Any]:
    """As the journal and ``--json`` have it."""
    return _DECISION.dump_python(decision, mode="json")


def read_decision(text: str, name: str = "decision") -> Decision:
    """Of any version's journal. Raises JournalError."""
    try:
        return _DECISION.validate_python(object_of(text, name))
    except (ValidationError, OverflowError) as error:
        detail = problem(error) if isinstance(error, ValidationError) else str(error)
        raise JournalError(f"the journal is damaged: {name}: {detail}") from None


def evidence_as_json(evidence: Evidence) -> dict[str, Any]:
    """One flat object, as the journal and ``--json`` have it."""
    provenance = _PROVENANCE.dump_python(evidence.provenance, mode="json")
    for name in ("slo", "workload"):
        provenance[name] = {key: value for key, value in provenance[name].items() if value is not None}
    return {**decision_as_json(evidence.decision), **provenance}


def read_evidence(text: str) -> Evidence:
    """Of any version's journal. Raises JournalError."""
    content = object_of(text, "evidence")
    try:
        return Evidence(read_decision(text, "evidence"), _PROVENANCE.validate_python(content))
    except ValidationError as error:
        raise JournalError(f"the journal is damaged: evidence: {problem(error)}") from None
