"""The optimizers by name."""

from collections.abc import Callable, Mapping

from sidecar.search.contract import Optimizer
from sidecar.search.space import Space
from sidecar.search.tba import Annealing
from sidecar.search.tba_tpe import TbaTpe
from sidecar.search.tpe import Tpe
from sidecar.search.uniform import Uniform

_MAKERS: Mapping[str, Callable[[Space, int, int], Optimizer]] = {
    "tba-tpe": TbaTpe,
    "tba": Annealing,
    "tpe": lambda space, seed, _budget: Tpe(space, seed),
    "random": lambda space, seed, _budget: Uniform(space, seed),
}
NAMES = tuple(_MAKERS)
DEFAULT = NAMES[0]


def make(name: str, space: Space, seed: int, budget: int) -> Optimizer:
    """The optimizer ``name`` over ``space``, for ``budget`` trials, the incumbent's included.

    Raises:
        ValueError: there is no such optimizer, ``seed`` is negative, or ``budget`` is less than one trial.
    """
    if name not in _MAKERS:
        raise ValueError(f"no optimizer is called {name!r}; there are {', '.join(NAMES)}")
    if seed < 0:
        raise ValueError(f"the seed must not be negative, got {seed}")
    if budget < 1:
        raise ValueError(f"the budget must be at least 1 trial, got {budget}")
    return _MAKERS[name](space, seed, budget)
