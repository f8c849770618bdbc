"""Annealing until enough is known, then TPE warm-started with the full history (arXiv 2604.17627)."""

from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.search.contract import Observation, ObservedStatus, Proposal
from sidecar.search.failed_configs import trials_run
from sidecar.search.paper_constants import PUBLISHED
from sidecar.search.space import Space
from sidecar.search.tba import Annealing
from sidecar.search.tpe import Tpe


def forced_after(budget: int) -> int:
    """The number of trials after which annealing ends at the latest."""
    return max(PUBLISHED.forced_trials, budget * PUBLISHED.forced_percent // 100)


def handed_off(history: Sequence[Observation], budget: int) -> bool:
    """Whether TPE has taken over. The counts only grow, so there is no way back."""
    trials = trials_run(history)
    if trials >= forced_after(budget):
        return True
    feasible = sum(observation.outcome is ObservedStatus.FEASIBLE for observation in history)
    return (
        trials >= max(PUBLISHED.early_trials, budget // PUBLISHED.early_divisor)
        and feasible >= max(PUBLISHED.feasible_trials, budget // PUBLISHED.feasible_divisor)
        and trials - feasible >= max(PUBLISHED.bad_trials, budget // PUBLISHED.bad_divisor)
    )


@dataclass(frozen=True)
class TbaTpe:
    """The optimizer. ``budget`` is the number of trials that may run, including the incumbent's."""

    space: Space
    seed: int
    budget: int

    def ask(self, history: Sequence[Observation]) -> Proposal:
        """TBA's proposal before the handoff, TPE's after."""
        if handed_off(history, self.budget):
            return Tpe(self.space, self.seed, startup=0, joint=False).ask(history)
        return Annealing(self.space, self.seed, forced_after(self.budget)).ask(history)
