"""What an optimizer is given and what it answers.

An optimizer keeps no state: it answers from the history alone, so that a search that was killed goes on as if it had
not been. To "tell" is to append to the history.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from vllm_sloguard.knobs import KnobValues


class ObservedStatus(StrEnum):
    """What became of a configuration."""

    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"  # served, and missed the SLO
    CRASHED = "crashed"
    REFUSED = "refused"  # by the guard: it never ran


@dataclass(frozen=True)
class Observation:
    """One entry of the history.

    ``config`` is what ran, after repair. ``violation`` is 0 when feasible, else the mean over the constraints of how
    far each limit was missed, relative to it (0.5: half as much again as allowed); ``inf`` for a crash or a refusal.
    ``value`` is the objective, higher is better, ``None`` where it was not measured. ``margins`` are, for each
    constraint, (measured - limit) / limit: 0 or less is met; ``None`` where nothing was measured. A ``prior``
    observation is of an earlier run: it informs the models, and costs no budget.

    The margins of a load that was stopped early are estimates. ``margin_sds`` and ``value_sd`` are the standard
    deviations of the logarithms of measured / limit and of the value, beyond the spread between repeats. ``bounds``
    names the margins that are only lower bounds, as in journals from before there were estimates.
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
        """Whether the whole load was measured."""
        return not self.margin_sds and not self.bounds

    def __post_init__(self) -> None:
        if (self.outcome is ObservedStatus.FEASIBLE) != (self.violation == 0):
            raise ValueError(f"a violation of {self.violation} does not go with {self.outcome}")
        if self.outcome is ObservedStatus.FEASIBLE and self.value is None:
            raise ValueError("a feasible observation must have a value")
        if not self.violation >= 0:  # NaN as well: one such entry would stop every later ask
            raise ValueError(f"a violation must be 0 or more, got {self.violation}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a value must be finite, or None where it was not measured, got {self.value}")
        if self.margins is not None and any(math.isnan(margin) for margin in self.margins.values()):
            raise ValueError("a margin must be a number")


@dataclass(frozen=True)
class Projection:
    """What the guard would make of a proposal: ``config`` after repair, or why it is refused, in ``refusal``.

    ``kv_tokens`` are the tokens that the KV cache would hold, ``None`` where that is not known.
    """

    config: KnobValues
    refusal: str = ""
    kv_tokens: int | None = None


@dataclass(frozen=True)
class Context:
    """What is known besides the space and the history.

    ``incumbent`` is the current configuration, over the knobs of the space. ``project`` asks the guard, read-only;
    ``None`` where there is none. ``limits`` are those of the SLO, by the names of the margins; latencies in ms.
    ``is_cold`` says whether a configuration needs a restart, where some do not.
    """

    incumbent: KnobValues | None = None
    longest_request_tokens: int | None = None
    project: Callable[[KnobValues], Projection] | None = None
    limits: Mapping[str, float] | None = None
    is_cold: Callable[[KnobValues], bool] | None = None


@dataclass(frozen=True)
class Proposal:
    """A configuration to try, the phase of the search it comes from, and why, in a phrase."""

    config: KnobValues
    phase: str
    reason: str


class Optimizer(Protocol):
    """Proposes the next configuration. Deterministic: the same history gives the same proposal."""

    def ask(self, history: Sequence[Observation]) -> Proposal:
        """The next configuration to try after ``history``, oldest first."""
        ...
