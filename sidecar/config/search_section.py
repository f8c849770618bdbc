"""The section ``search`` of the configuration file."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, FiniteFloat, model_validator

from sidecar.config.engine_arguments import ArgsField
from sidecar.config.knob_ranges import check_kind, overridden
from sidecar.config.mistakes import MisplacedValues, Mistake
from sidecar.config.window import Section
from sidecar.search.registry import DEFAULT as DEFAULT_OPTIMIZER
from sidecar.search.registry import OPTIMIZERS, make
from sidecar.search.space import Space
from vllm_sloguard.knobs import Knob

# Without search.knobs: they matter on any machine, and each can be set for any model.
DEFAULT_KNOBS = ("max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "enable_chunked_prefill")


class KnobRange(Section):
    """Restrictions on a knob for the search; missing fields default to the knob table."""

    low: FiniteFloat | int | None = None
    high: FiniteFloat | int | None = None
    choices: list[bool | int | float | str] | None = None


class SearchConfig(Section):
    """The search: knobs, number of trials, seed; ``unguarded`` trials skip the guard and the repair."""

    optimizer: str = DEFAULT_OPTIMIZER
    budget: Annotated[int, Field(ge=1)] = 15
    seed: Annotated[int, Field(ge=0)] = 0
    knobs: dict[str, KnobRange | None] = Field(default=dict.fromkeys(DEFAULT_KNOBS))
    unguarded: list[ArgsField] = Field(default=[])

    @model_validator(mode="after")
    def _known(self) -> "SearchConfig":
        mistakes = [*self._wrong_optimizer(), *self._wrong_knobs(), *self._wrong_unguarded()]
        if mistakes:
            raise MisplacedValues(mistakes)
        make(self.optimizer, Space(self.space_knobs()), self.seed, self.budget)  # fails if a package is missing
        return self

    def _wrong_optimizer(self) -> Iterator[Mistake]:
        if self.optimizer not in OPTIMIZERS:
            yield Mistake(("optimizer",), f"{self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")

    def _wrong_knobs(self) -> Iterator[Mistake]:
        if not self.knobs:
            yield Mistake(("knobs",), "at least one is needed, such as `knobs: {max_num_seqs: {low: 8, high: 256}}`")
        for name, limits in self.knobs.items():
            try:
                _ranged(name, limits)
            except ValueError as error:
                yield Mistake(("knobs", name), str(error))

    def _wrong_unguarded(self) -> Iterator[Mistake]:
        for number, args in enumerate(self.unguarded):
            for name, value in args.items():
                try:
                    check_kind(overridden(name), value)
                except ValueError as error:
                    yield Mistake(("unguarded", number, name), str(error))

    def space_knobs(self) -> tuple[Knob, ...]:
        """The knobs of the search with their ranges."""
        return tuple(_ranged(name, limits) for name, limits in self.knobs.items())


def _ranged(name: str, limits: KnobRange | None) -> Knob:
    limits = limits or KnobRange()
    return overridden(name, limits.low, limits.high, limits.choices)
