"""Inputs that are broken in their bytes or in their values, and what may come of them: one clear line, or nothing.

SLOGUARD_FUZZ is how many inputs are tried in all; every kind gets as many.
"""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

KINDS = (
    "configuration",
    "telemetry message",
    "live message",
    "control request",
    "load client's answer",
    "journal bytes",
    "journal rows",
    "result file",
    "model config.json",
    "learned.json",
    "landscape",
)
ASKED = int(os.environ.get("SLOGUARD_FUZZ", "1100"))
# By kind and by what came of the input.
COUNTS: Counter[tuple[str, str]] = Counter()

fuzzed = settings(
    max_examples=-(-ASKED // len(KINDS)),
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=(
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ),
)

_NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e-320, 1e308, 1e309]
)
_TEXTS = st.sampled_from(
    ["", "0", "-1", "nan", "auto", "a\0b", "\u2028", "²", "x" * 3000, "\x1b[31m", "--host", "../.."]
)
SCALARS = st.none() | st.booleans() | _NUMBERS | st.integers() | st.floats() | _TEXTS | st.text(max_size=10)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
# What breaks parsers more often than chance does.
_TOKENS = st.sampled_from(
    (
        *(
            b"\0",
            b"\xff\xfe",
            b"\xed\xa0\x80",
            b"\n",
            b"\r",
            b"\x1b]0;x\x07",
            b"{",
            b"}",
            b"[" * 2000,
            b'"',
            b"'",
            b"%",
        ),
        *(b": ", b"- ", b"&a [*a]", b"!!python/object:os.system", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"null"),
    )
)


@st.composite
def broken_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` with a few parts replaced, removed, doubled or inserted."""
    content = whole
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 1, 4, 40, len(content)])))
        part = draw(st.one_of(_TOKENS, st.binary(max_size=8), st.just(b""), st.just(content[start:end] * 2)))
        content = content[:start] + part + content[end:]
    return content


@st.composite
def broken_values(draw: st.DrawFn, whole: Any) -> Any:
    """``whole`` (lists and dictionaries) with one to three values replaced, removed or added."""
    for _ in range(draw(st.integers(1, 3))):
        whole = _altered(draw, whole)
    return whole


def _altered(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 4)) == 0:
        return draw(JUNK)
    if isinstance(value, list):
        items = list(cast("list[Any]", value))
        place = draw(st.integers(0, len(items) - 1))
        return [
            *items[:place],
            *([] if draw(st.integers(0, 7)) == 0 else [_altered(draw, items[place])]),
            *items[place + 1 :],
        ]
    fields = dict(cast("dict[Any, Any]", value))
    name = draw(st.sampled_from(list(fields)))
    match draw(st.integers(0, 7)):
        case 0:
            del fields[name]
        case 1:
            fields[draw(st.text(max_size=6))] = draw(JUNK)
        case _:
            fields[name] = _altered(draw, fields[name])
    return fields


def took(kind: str, attempt: Callable[[], object], *refusals: type[Exception]) -> None:
    """Asserts that ``attempt`` works, or fails with one of ``refusals`` in one clear line."""
    try:
        attempt()
    except refusals as error:
        assert_clear(str(error))
        COUNTS[kind, "refused"] += 1
    else:
        COUNTS[kind, "taken"] += 1


def assert_clear(message: str) -> None:
    """Asserts that the message is one line of readable length, or a count of mistakes and a line for each."""
    assert message.strip(), "it says nothing"
    first, *others = message.split("\n")
    assert not others or first.endswith(" mistakes"), f"more than a line: {message!r}"
    assert all(other.startswith("  ") for other in others), f"more than a line: {message!r}"
    assert len(others) <= 31, f"{len(others)} lines"
    assert all(len(line) < 2000 for line in (first, *others))
    assert "Traceback" not in message


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
