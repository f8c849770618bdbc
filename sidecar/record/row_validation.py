"""Validates rows read from the journal, which may be damaged."""

import json
import sqlite3
from typing import Any, cast

from pydantic import ValidationError


class JournalError(RuntimeError):
    """The journal can't be used; the text is one line."""

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.split()))


# SQLite does not enforce column types, and a damaged file can hold anything.
_NUMBERS = frozenset(
    {"id", "run", "number", "pid", "at", "started_at", "ended_at", "until", "epoch", "rolled_back_at", "user_version"}
)
_NEEDED = frozenset(
    {"id", "number", "pid", "at", "started_at", "digest", "role", "engine_id", "state", "reason", "plan", "kind"}
)
_MAX_NUMBER = 1e11  # seconds, the year 5138


def check_value(row: sqlite3.Row) -> None:
    """Raises JournalError for a value of the wrong type or range."""
    for name in row.keys():  # noqa: SIM118 - a row iterates over its values
        value = row[name]
        if value is None and name not in _NEEDED:
            continue
        if not (is_number(value) if name in _NUMBERS else isinstance(value, str)):
            raise JournalError(f"the journal is damaged: {name}: {str(value)[:40]!r}")


def problem(error: ValidationError) -> str:
    """The first validation error, with its location."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def is_number(value: object) -> bool:
    """Whether it is valid as a number, time or duration."""
    return isinstance(value, int | float) and 0 <= value < _MAX_NUMBER


def object_of(text: str, name: str) -> dict[str, Any]:
    """The JSON object in ``text``. Raises JournalError."""
    try:
        content: object = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise JournalError(f"the journal is damaged: {name}: {error}") from None
    if not isinstance(content, dict):
        raise JournalError(f"the journal is damaged: {name}: an object is needed, got {text[:40]!r}")
    return cast("dict[str, Any]", content)
