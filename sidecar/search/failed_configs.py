"""Configurations that crashed or were refused, so that they are not tried again."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

from sidecar.search.contract import Observation, ObservedStatus
from sidecar.search.paper_constants import PUBLISHED
from sidecar.search.space import Space
from vllm_sloguard.knobs import KnobKind, KnobValues, Value

Setting: TypeAlias = tuple[str, Value]
ATTEMPTS = 32
# Consecutive refusals after which the search gives up.
MAX_REFUSALS_IN_A_ROW = 20


def failed(observation: Observation) -> bool:
    """Whether the configuration gave no measurement: it crashed, or the guard refused it."""
    return observation.outcome in (ObservedStatus.CRASHED, ObservedStatus.REFUSED)


def trials_run(history: Sequence[Observation]) -> int:
    """Number of trials of this run that ran. Refusals cost no budget and do not count."""
    return sum(observation.outcome is not ObservedStatus.REFUSED and not observation.prior for observation in history)


@dataclass(frozen=True)
class FailedConfigs:
    """Exact configurations that failed, over the knobs of the space."""

    configs: frozenset[frozenset[Setting]]

    @classmethod
    def of(cls, space: Space, history: Sequence[Observation]) -> "FailedConfigs":
        """Those of ``history``."""
        return cls(frozenset(frozenset(space.active(o.config).items()) for o in history if failed(o)))

    def __contains__(self, config: KnobValues) -> bool:
        return frozenset(config.items()) in self.configs

    def avoiding(self, propose: Callable[[], tuple[dict[str, Value], str]]) -> tuple[dict[str, Value], str]:
        """The first proposal that has not failed; the last one if all have, as in a tiny space."""
        config, why = propose()
        for _ in range(ATTEMPTS):
            if config not in self:
                break
            config, why = propose()
        return config, why


@dataclass(frozen=True)
class Blacklist:
    """Categorical values, and pairs of them, that failed three times in a row (arXiv 2604.17627).

    A streak is over the observations with that value and ends with one that ran. The eight trials of a ban count
    refusals too; otherwise a ban under which the guard refuses everything would never end.
    """

    banned: frozenset[frozenset[Setting]]

    @classmethod
    def of(cls, space: Space, history: Sequence[Observation]) -> "Blacklist":
        """The bans in force after ``history``."""
        streaks: Counter[frozenset[Setting]] = Counter()
        banned_until: dict[frozenset[Setting], int] = {}
        for index, observation in enumerate(history):
            for held in _held(space, observation.config):
                streaks[held] = streaks[held] + 1 if failed(observation) else 0
                if streaks[held] == PUBLISHED.blacklist_failures:
                    streaks[held] = 0
                    banned_until[held] = index + PUBLISHED.blacklist_trials
        return cls(frozenset(held for held, last in banned_until.items() if len(history) <= last))

    def permits(self, config: KnobValues, name: str, value: Value) -> bool:
        """Whether ``name`` may change to ``value`` with the rest of ``config`` unchanged."""
        entered = (name, value)
        pairs = (frozenset((entered, (other, held))) for other, held in config.items() if other != name)
        return frozenset((entered,)) not in self.banned and not any(pair in self.banned for pair in pairs)


def _held(space: Space, config: KnobValues) -> list[frozenset[Setting]]:
    """The categorical values of ``config``, alone and in pairs."""
    settings = [
        (name, value)
        for name, value in space.active(config).items()
        if space.by_name[name].kind is KnobKind.CATEGORICAL and space.by_name[name].holds(value)
    ]
    return [frozenset((setting,)) for setting in settings] + [frozenset(pair) for pair in combinations(settings, 2)]
