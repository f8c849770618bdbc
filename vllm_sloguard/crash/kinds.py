"""The categories of a crash, and a crash as it is recorded."""

from dataclasses import dataclass
from enum import StrEnum


class Category(StrEnum):
    """The four categories of the SLO-Guard study, and engine deaths for any other reason."""

    OUT_OF_MEMORY = "out_of_memory"
    CUDA_ERROR = "cuda_error"
    STARTUP_FAILURE = "startup_failure"
    TIMEOUT = "timeout"
    ENGINE_DEATH = "engine_death"


@dataclass(frozen=True)
class Crash:
    """Why an engine exited.

    ``process`` is the name in the prefix of the line, "" if it has none. ``line_number`` counts from 1; None if
    the evidence is not a line of the log.
    """

    category: Category
    evidence: str
    process: str
    phase: str
    exit_code: int | None
    line_number: int | None = None
