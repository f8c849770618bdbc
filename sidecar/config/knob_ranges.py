"""Overrides of the knob table in a configuration: narrower ranges, other choices, values of the right type."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import replace

from vllm_sloguard.knobs import KNOBS, Knob, KnobKind, Value


def check_kind(knob: Knob, value: object) -> None:
    """A value of the knob's own type: free text in place of a switch would be parsed as another vLLM argument."""
    kinds = {
        KnobKind.INT: {int},
        KnobKind.FLOAT: {int, float},
        KnobKind.CATEGORICAL: {type(choice) for choice in knob.choices},
    }[knob.kind]
    if type(value) not in kinds or (isinstance(value, str) and value.startswith("-")):
        wanted = " or ".join(sorted(_KINDS[kind] for kind in kinds))
        raise ValueError(f"{value!r}: {wanted} is needed")


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text without a leading dash"}


def overridden(
    name: str, low: float | None = None, high: float | None = None, choices: Sequence[Value] | None = None
) -> Knob:
    """The knob ``name`` of the table with another range, or other choices. Raises ValueError."""
    if name not in KNOBS:
        close = difflib.get_close_matches(name.replace("-", "_")[:80], KNOBS, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"not a knob; {meant}allowed: {', '.join(KNOBS)}")
    knob = KNOBS[name]
    if knob.kind is KnobKind.CATEGORICAL:
        if low is not None or high is not None:
            raise ValueError(f"takes choices, not low and high, such as `{name}: {{choices: [{_choices(knob)}]}}`")
        choices = tuple(choices) if choices is not None else knob.choices
        if not choices:
            raise ValueError(f"choices must not be empty; the default is `choices: [{_choices(knob)}]`")
        for choice in choices:
            check_kind(knob, choice)
        return replace(knob, choices=choices)
    if choices is not None:
        raise ValueError(
            f"takes low and high, not choices, such as `{name}: {{low: {knob.low:g}, high: {knob.high:g}}}`"
        )
    low = knob.low if low is None else low
    high = knob.high if high is None else high
    if low < 0:
        raise ValueError(f"low must not be negative, got {low:g}")
    whole = knob.kind is not KnobKind.INT or (low == math.floor(low) and high == math.floor(high))
    if not whole:
        raise ValueError(f"low and high must be whole numbers, got {low} and {high}")
    try:
        return replace(knob, low=low, high=high, log=knob.log and low > 0)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{name}: ")) from None


def _choices(knob: Knob) -> str:
    return ", ".join(str(choice).lower() for choice in knob.choices)
