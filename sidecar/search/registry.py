"""The optimizers by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sidecar.search.contract import Context, Observation, Optimizer, Proposal
from sidecar.search.random_search import Uniform
from sidecar.search.sloguard import SearchFeatures, SloGuard
from sidecar.search.space import Space
from sidecar.search.tba import Annealing


def _tpe(space: Space, seed: int, _budget: int) -> Optimizer:
    from sidecar.search.tpe import Tpe

    return Tpe(space, seed)


def _gp(space: Space, seed: int, _budget: int) -> Optimizer:
    from sidecar.search.gp import Gp

    return Gp(space, seed)


def _tba_tpe(space: Space, seed: int, budget: int) -> Optimizer:
    from sidecar.search.tba_tpe import TbaTpe

    return TbaTpe(space, seed, budget)


# Optuna is imported only when an optimizer needs it: the import is slow, and most commands need none.
_COLD: Mapping[str, Callable[[Space, int, int], Optimizer]] = {
    "random": lambda space, seed, _budget: Uniform(space, seed),
    "tpe": _tpe,
    "gp": _gp,
    "tba": Annealing,
    "tba-tpe": _tba_tpe,
}
_PARTS: Mapping[str, SearchFeatures] = {
    "sloguard": SearchFeatures(),
    "sloguard-no-incumbent": SearchFeatures(incumbent=False),
    "sloguard-no-guard": SearchFeatures(guard=False),
    "sloguard-no-crash-model": SearchFeatures(crash_model=False),
    "sloguard-no-priors": SearchFeatures(priors=False),
    "sloguard-no-estimates": SearchFeatures(estimates=False),
    "sloguard-no-repeats": SearchFeatures(repeats=False),
    "sloguard-luckiest": SearchFeatures(luckiest=True),
}
DEFAULT = "sloguard"
OPTIMIZERS = (*_COLD, DEFAULT)
ABLATIONS = tuple(name for name in _PARTS if name != DEFAULT)


def chooses_the_luckiest(name: str) -> bool:
    """Whether the candidate is the best single measurement: the ablation without model-based selection."""
    return name in _PARTS and _PARTS[name].luckiest


@dataclass(frozen=True)
class _Cold:
    """An optimizer as published: it sees neither the incumbent nor earlier runs."""

    optimizer: Optimizer

    def ask(self, history: Sequence[Observation]) -> Proposal:
        return self.optimizer.ask([observation for observation in history if not observation.prior])


def make(name: str, space: Space, seed: int, budget: int, context: Context | None = None) -> Optimizer:
    """The optimizer ``name`` over ``space``, for ``budget`` trials including the incumbent's.

    Raises:
        ValueError: there is no such optimizer, it needs a package that is missing, ``seed`` is negative, or
            ``budget`` is less than one trial.
    """
    if name not in _COLD and name not in _PARTS:
        raise ValueError(f"unknown optimizer {name!r}; known are {', '.join((*OPTIMIZERS, *ABLATIONS))}")
    if seed < 0:
        raise ValueError(f"the seed must not be negative, got {seed}")
    if budget < 1:
        raise ValueError(f"the budget must be at least 1 trial, got {budget}")
    if name in _COLD:
        return _Cold(_COLD[name](space, seed, budget))
    return SloGuard(space, seed, budget, context or Context(), _PARTS[name])
