"""Typed access to the fields of a config.json; errors are one line that names the field."""

from collections.abc import Mapping
from typing import Any, cast

Fields = Mapping[str, Any]
# Far above any real size, and small enough that products of several remain finite as floats.
_MOST = 2**40


def positive(fields: Fields, key: str) -> int | None:
    """A whole number from 1 to 2^40; None where the key is absent or null.

    Raises:
        ValueError: it is something else.
    """
    value: object = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise wrong(key, "a positive whole number", value)
    if value > _MOST:
        raise wrong(key, "at most 2^40", value)
    return value


def whole(fields: Fields, key: str) -> int:
    """A whole number from 0 to 2^40; 0 where the key is absent or null. Raises ValueError."""
    value: object = fields.get(key)
    return 0 if value == 0 and not isinstance(value, bool) else (positive(fields, key) or 0)


def first(fields: Fields, keys: tuple[str, ...]) -> int | None:
    """The first of several alternative names that is present. Raises ValueError."""
    return next((value for key in keys if (value := positive(fields, key)) is not None), None)


def largest(fields: Fields, keys: tuple[str, ...]) -> int:
    """The first of several alternative names that is not 0, or 0; of a list by layer the largest. Raises ValueError."""
    for key in keys:
        value: object = fields.get(key)
        listed = cast("list[object]", value) if isinstance(value, list) else [value]
        if number := max((whole({key: entry}, key) for entry in listed), default=0):
            return number
    return 0


def required(fields: Fields, *keys: str) -> int:
    """Like ``first``, but a missing field is an error. Raises ValueError."""
    value = first(fields, keys)
    if value is None:
        raise ValueError(f"model config: {keys[0]} is missing")
    return value


def flag(fields: Fields, key: str) -> bool | None:
    """True, false, or None where the key is absent or null. Raises ValueError."""
    value: object = fields.get(key)
    if value is not None and not isinstance(value, bool):
        raise wrong(key, "true or false", value)
    return value


def name(fields: Fields, key: str) -> str:
    """A text; empty where the key is absent or null. Raises ValueError."""
    value: object = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise wrong(key, "a text", value)
    return value or ""


def names(fields: Fields, key: str) -> tuple[str, ...]:
    """A list of texts; empty where the key is absent or null. Raises ValueError."""
    value: object = fields.get(key)
    if value is None:
        return ()
    parts = cast("list[object]", value) if isinstance(value, list) else [None]
    texts = tuple(part for part in parts if isinstance(part, str))
    if len(texts) != len(parts):
        raise wrong(key, "a list of texts", cast("object", value))
    return texts


def nested(fields: Fields, key: str) -> Fields | None:
    """An object; None where the key is absent or null. Raises ValueError."""
    value: object = fields.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise wrong(key, "an object", value)
    return cast("Fields | None", value)


def wrong(key: str, expected: str, value: object) -> ValueError:
    """The error for a field of the wrong type, with its value shortened to fit the line."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or objects within objects
        shown = f"a very large {type(value).__name__}"
    return ValueError(
        f"model config: {key} must be {expected}, got {shown if len(shown) <= 60 else shown[:57] + '...'}"
    )
