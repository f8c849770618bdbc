"""Splits a log of any deployment into records, each with its process, level and line number.

Memory is bounded: a line of the file is held at most ``_LONGEST_PIECE`` characters at a time.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import cast

from vllm_sloguard.crash.prefixes import (
    EMBEDDED_RECORD,
    NO_PREFIX,
    QUIET_LEVELS,
    LogRecord,
    PrefixParser,
    start_with_process,
)

_LONGEST_PIECE = 1 << 16
_SHORT_LINE_CHARS = 60  # one record
_PREFIX_CHARS = 160
_FLAT_TRACEBACK = re.compile(
    r"(?<=\s)(?=File \"[^\"]{1,300}\", line \d+|Traceback \(most recent call last\)"
    r"|The above exception was|During handling of the above"
    r"|(?:[a-z_]\w*\.){0,6}[A-Z]\w*(?:Error|Exception): )"
)


def records(chunks: Iterable[str], first_number: int = 1) -> Iterator[LogRecord]:
    """The records of a log that comes in pieces of any size; ``first_number`` is its first line's."""
    prefixes = PrefixParser()
    for number, line in _numbered(chunks, first_number):
        for part in _parts(line):
            yield prefixes.parse(number, part)


def _numbered(chunks: Iterable[str], number: int) -> Iterator[tuple[int, str]]:
    rest = ""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            for start in range(0, max(len(line), 1), _LONGEST_PIECE):
                yield number, line[start : start + _LONGEST_PIECE]
            number += 1
        while len(rest) > _LONGEST_PIECE:
            yield number, rest[:_LONGEST_PIECE]
            rest = rest[_LONGEST_PIECE:]
    if rest:
        yield number, rest


def _parts(line: str) -> Iterator[str]:
    for part in line.split("\r") if "\r" in line else (line,):
        if part.startswith("{"):
            part = _from_json(part)  # noqa: PLW2901 - a container runtime's wrapping of the same line
        if len(part) < _SHORT_LINE_CHARS:
            yield part
            continue
        for record in _cut(part):
            if "Traceback (most recent call last)" in record and 'File "' in record:
                yield from _FLAT_TRACEBACK.split(record)
            else:
                yield record


def _cut(line: str) -> Iterator[str]:
    begin = 0
    for match in EMBEDDED_RECORD.finditer(line):
        at = start_with_process(line, begin, match.start())
        # What stands in front of a line's first record is its prefix.
        if at > begin and (begin or at > _PREFIX_CHARS or NO_PREFIX.search(line[:at])):
            yield line[begin:at]
            begin = at
    yield line[begin:]


def _from_json(line: str) -> str:
    """The message of a line of Docker's json-file driver or of a JSON formatter; other lines as they are."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return line
    if not isinstance(fields, dict):
        return line
    values = cast("dict[str, object]", fields)
    message = _first_text(values, ("log", "message", "msg")).rstrip("\n")
    # "severity" is the collector's: INFO for all of stdout, ERROR for all of stderr.
    level = _first_text(values, ("level", "levelname")).upper()
    if not message:
        return line
    return f"{level}: {message}" if level in {*QUIET_LEVELS, "ERROR", "CRITICAL"} else message


def _first_text(values: dict[str, object], names: tuple[str, ...]) -> str:
    return next((value for name in names if isinstance(value := values.get(name), str)), "")
