"""The optimizer contract: inputs and outputs.

Optimizers are stateless: a proposal depends on the history alone, so a killed search resumes where it stopped.
To "tell" is to append to the history.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from vllm_sloguard.knobs import KnobValues


class ObservedStatus(StrEnum):
    """The outcome of a trial."""

    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"  # ran but missed the SLO
    CRASHED = "crashed"
    REFUSED = "refused"  # by the guard: it never ran


@dataclass(frozen=True)
class Observation:
    """One entry of the history.

    ``config`` is what ran, after repair. ``violation`` is 0 when feasible, else the mean relative excess over the
    constraints (0.5: 50% over the limit); ``inf`` for a crash or a refusal. ``value`` is the objective, higher is
    better, ``None`` if not measured. ``margins`` are (measured - limit) / limit for each constraint: 0 or less meets
    it, ``None`` is unmeasured. A ``prior`` observation comes from an earlier run: it informs the models and costs no
    budget.

    The margins of a load that was stopped early are estimates. ``margin_sds`` and ``value_sd`` are the standard
    deviations of log(measured / limit) and of log(value), in addition to run-to-run spread. ``bounds`` names the
    margins that are only lower bounds, as in journals older than the estimates.
    """

    config: KnobValues
    outcome: ObservedStatus
    violation: float
    value: float | None
    margins: Mapping[str, float] | None = None
    prior: bool = False
    margin_sds: Mapping[str, float] | None = None
    value_sd: float = 0.0
    bounds: frozenset[str] = frozenset()

    @property
    def complete(self) -> bool:
        """Whether the load ran to its end."""
        return not self.margin_sds and not self.bounds

    def __post_init__(self) -> None:
        if (self.outcome is ObservedStatus.FEASIBLE) != (self.violation == 0):
            raise ValueError(f"a violation of {self.violation} does not go with {self.outcome}")
        if self.outcome is ObservedStatus.FEASIBLE and self.value is None:
            raise ValueError("a feasible observation must have a value")
        if not self.violation >= 0:  # NaN as well: a single NaN would break every later ask
            raise ValueError(f"a violation must be 0 or more, got {self.violation}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a value must be finite, or None if not measured, got {self.value}")
        if self.margins is not None and any(math.isnan(margin) for margin in self.margins.values()):
            raise ValueError("a margin must be a number")


@dataclass(frozen=True)
class Projection:
    """The guard's projection of a proposal: ``config`` after repair, or the reason for refusing it in ``refusal``.

    ``kv_tokens`` is the predicted capacity of the KV cache in tokens, ``None`` if unknown.
    """

    config: KnobValues
    refusal: str = ""
    kv_tokens: int | None = None


@dataclass(frozen=True)
class Context:
    """Context beyond the space and the history.

    ``incumbent`` is the current configuration, restricted to the knobs of the space. ``project`` asks the guard
    without side effects; ``None`` if there is no guard. ``limits`` are the SLO's, keyed like the margins; latencies
    in ms. ``is_cold`` tells whether a configuration needs a restart; ``None`` if all do.
    """

    incumbent: KnobValues | None = None
    longest_request_tokens: int | None = None
    project: Callable[[KnobValues], Projection] | None = None
    limits: Mapping[str, float] | None = None
    is_cold: Callable[[KnobValues], bool] | None = None


@dataclass(frozen=True)
class Proposal:
    """A configuration to try, the search phase that proposed it, and a short reason."""

    config: KnobValues
    phase: str
    reason: str


class Optimizer(Protocol):
    """Proposes the next configuration. Deterministic: the same history gives the same proposal."""

    def ask(self, history: Sequence[Observation]) -> Proposal:
        """The next configuration to try after ``history``, oldest first."""
        ...
