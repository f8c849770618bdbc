"""The default: from the incumbent outward, within what the guard passes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sidecar.search.contract import Context, Observation, Proposal
from sidecar.search.failures import ran
from sidecar.search.space import Space
from sidecar.search.tba_tpe import TbaTpe


@dataclass(frozen=True)
class Parts:
    """Which parts of the design are in use; an ablation leaves one out."""

    incumbent: bool = True
    guard: bool = True
    crash_model: bool = True
    priors: bool = True
    repeats: bool = True


@dataclass(frozen=True)
class SloGuard:
    """The optimizer. ``budget`` is the number of trials that may run, the incumbent's included."""

    space: Space
    seed: int
    budget: int
    context: Context
    parts: Parts = field(default_factory=Parts)

    def ask(self, history: Sequence[Observation]) -> Proposal:
        """The incumbent first, then the best neighbour."""
        if ran(history) == 0 and self.parts.incumbent and self.context.incumbent is not None:
            return Proposal(self.space.project(self.context.incumbent), "incumbent", "what is serving today")
        return TbaTpe(self.space, self.seed, self.budget).ask(history)
