"""The search space: its configurations and their neighbours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from typing import TypeAlias

import numpy as np

from sidecar.search.knob_values import centre, draw, moved, nearest
from vllm_sloguard.knobs import Knob, KnobKind, KnobValues, Value

MayChange: TypeAlias = Callable[[KnobValues, str, Value], bool]


def _always(_config: KnobValues, _name: str, _value: Value) -> bool:
    return True


@dataclass(frozen=True)
class Space:
    """A space of configurations over ``knobs``.

    A configuration of the space holds exactly the active knobs: those whose ``requires`` hold. A requirement on an
    argument outside the space is assumed to hold, since the search cannot change it.

    Raises:
        ValueError: there is no knob, a name occurs twice, or the requirements are circular.
    """

    knobs: tuple[Knob, ...]

    def __post_init__(self) -> None:
        if not self.knobs:
            raise ValueError("a space must have at least one knob")
        if len(self.by_name) < len(self.knobs):
            raise ValueError("a knob occurs twice in the space")
        _ = self.by_requirement  # fail on a circular requirement now, not at the first proposal

    @cached_property
    def by_name(self) -> Mapping[str, Knob]:
        """The knobs by name, in the order of the space."""
        return {knob.name: knob for knob in self.knobs}

    @cached_property
    def by_requirement(self) -> tuple[Knob, ...]:
        """The knobs in topological order of their requirements."""
        graph = {knob.name: [name for name in knob.requires if name in self.by_name] for knob in self.knobs}
        return tuple(self.by_name[name] for name in TopologicalSorter(graph).static_order())

    def active(self, config: KnobValues) -> dict[str, Value]:
        """``config`` restricted to the active knobs of the space."""
        kept: dict[str, Value] = {}
        for knob in self.by_requirement:
            if knob.name in config and self.matters(knob, kept):
                kept[knob.name] = config[knob.name]
        return self._in_order(kept)

    def matters(self, knob: Knob, config: KnobValues) -> bool:
        """Whether ``knob``'s requirements hold in ``config``, which must not contain inactive knobs."""
        required = self._required[knob.name]
        return not required or all(name in config and config[name] == value for name, value in required)

    @cached_property
    def _required(self) -> Mapping[str, tuple[tuple[str, Value], ...]]:
        """Each knob's requirements on the others in the space."""
        return {k.name: tuple((n, v) for n, v in k.requires.items() if n in self.by_name) for k in self.knobs}

    def contains(self, config: KnobValues) -> bool:
        """Whether ``config`` holds exactly the active knobs, each with an allowed value."""
        active = self.active(config)
        due = {knob.name for knob in self.knobs if self.matters(knob, active)}
        return set(config) == due and all(self.by_name[name].holds(value) for name, value in config.items())

    def sample(self, rng: np.random.Generator) -> dict[str, Value]:
        """A configuration drawn uniformly, each knob on its own scale."""
        return self._resolved({}, lambda knob: draw(knob, rng))

    def project(self, config: KnobValues) -> dict[str, Value]:
        """The configuration of the space closest to ``config``. Missing knobs are set to their centre."""
        return self._resolved(config, centre)

    def neighbour(
        self,
        config: KnobValues,
        rng: np.random.Generator,
        structural: float,
        spread: float,
        may_change: MayChange = _always,
    ) -> tuple[dict[str, Value], str]:
        """A configuration that differs from ``config`` in one knob, and the name of that knob.

        With probability ``structural`` a categorical knob changes, to a value that ``may_change`` allows; otherwise
        a numeric one moves by N(0, ``spread`` of its range). If one kind has nothing to change, the other is used,
        and if neither has, ``may_change`` is ignored. Newly active knobs are drawn at random. The name is empty in a
        space of one configuration.
        """
        here = self.project(config)
        prefers_structural = rng.random() < structural
        numeric = [self.by_name[name] for name in here if self.by_name[name].kind is not KnobKind.CATEGORICAL]
        choices = self._changes(here, may_change)
        if not choices and not numeric:
            choices = self._changes(here, _always)
        if choices and (prefers_structural or not numeric):
            name = list(choices)[int(rng.integers(len(choices)))]
            value = choices[name][int(rng.integers(len(choices[name])))]
        elif numeric:
            knob = numeric[int(rng.integers(len(numeric)))]
            name, value = knob.name, moved(knob, here[knob.name], spread, rng)
        else:
            return here, ""
        return self._resolved({**here, name: value}, lambda knob: draw(knob, rng)), name

    def _changes(self, here: KnobValues, may_change: MayChange) -> dict[str, list[Value]]:
        """The alternative values of each categorical knob that has any."""
        others = {
            name: [value for value in self.by_name[name].choices if value != current and may_change(here, name, value)]
            for name, current in here.items()
        }
        return {name: values for name, values in others.items() if values}

    def _resolved(self, config: KnobValues, absent: Callable[[Knob], Value]) -> dict[str, Value]:
        """Every active knob: clipped to its range if ``config`` has it, else from ``absent``."""
        resolved: dict[str, Value] = {}
        for knob in self.by_requirement:
            if self.matters(knob, resolved):
                resolved[knob.name] = nearest(knob, config[knob.name]) if knob.name in config else absent(knob)
        return self._in_order(resolved)

    def _in_order(self, config: KnobValues) -> dict[str, Value]:
        return {name: config[name] for name in self.by_name if name in config}
