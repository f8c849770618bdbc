"""Splits a log of any deployment into records: text without prefixes, with its process, level and line number.

Memory is bounded: a line of the file is held at most ``_LONGEST_PIECE`` characters at a time.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

QUIET_LEVELS = frozenset({"DEBUG", "INFO", "WARNING"})

_LONGEST_PIECE = 1 << 16
# No text that names a cause starts later in a record; a longer one is a dump.
_RECORD_CHARS = 4000
_MOST_PREFIXES = 8
_PREFIX_CHARS = 300


class LogRecord(NamedTuple):
    """One line of a log. ``text`` keeps its indentation; ``prefixed`` says whether vLLM's own prefix was in front."""

    number: int
    text: str
    process: str
    level: str
    source: str
    prefixed: bool


_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\].{0,100}?(?:\x07|\x1b\\)")
# Ray's colours in logs that lost their escape characters.
_BARE_COLOUR = re.compile(r"(?:^|(?<=[\s)\]]))\[\d{1,2}(?:;\d{1,2})?m|\[0m|\[39m")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufeff]")

_TIME = r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z| ?[+-]\d\d:?\d\d)?"
# What stands in front of vLLM's own prefix: container runtimes, log collectors, tools that show logs.
_DEPLOYMENT = re.compile(
    rf"(?:[\w./-]{{1,100}}\s{{1,40}}\|\s?"  # docker compose
    rf"|\[(?:pod/[\w./-]{{1,200}}|vllm[\w-]{{0,40}})\]:?\s"  # kubectl logs --prefix
    rf"|{_TIME}\s(?:stdout|stderr)\s[FP]\s?"  # CRI
    rf"|\[?{_TIME}\]?:?\s"
    r"|[A-Z][a-z]{2}\s{1,2}\d{1,2}\s\d\d:\d\d:\d\d(?:\.\d+)?\s[\w.-]{1,100}\s[\w.@:/-]{1,100}(?:\[\d+\])?:\s?"  # syslog
    r"|[│|]\s?)"
)
_PROCESS = re.compile(
    r"\(([\w.:/-]{1,80})(?: \+\S{1,20})?( rank=\d+)? pid=\d+(?:, [^)]{1,100})?\)\s?"
    r"|\((raylet|autoscaler|pid=\d+)[^)]{0,100}\)\s?"
    r"|\[(rank ?\d+)\]:\s?"
)
_RAY_CORE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ ([A-Z]) \d+ \d+\] (?:\(\w+\) )?[\w./-]{1,80}:\d+: ?")
_GLOG = re.compile(r"\[?([EWIF])(?:\d{4} \d\d:\d\d:\d\d[.\d]*(?: +\d+)?)? [\w./-]{1,100}:\d+\]\s?")
_VLLM = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:.]+ \[?([^\]\s]{1,100}?)(?::\d+)?\]\s?")
_LEVEL = re.compile(
    r"(?:\| )?(?:[\w.]{1,80} - |\[)?(DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL|FATAL)"
    r"(?:\s*(?:\]|:root:|:|\||-)|\s+[\w.]{1,60}\.py:\d+ (?:--|\]))(?=\s|$)\s*"
)
_LEVELS = {
    "WARN": "WARNING",
    "FATAL": "CRITICAL",
    "E": "ERROR",
    "F": "CRITICAL",
    "W": "WARNING",
    "I": "INFO",
    "D": "DEBUG",
}
# The start of a record within a line: a log that was pasted on one line, or wrapped at a terminal's width.
_EMBEDDED = re.compile(r"\b(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d")
_PROCESS_BEFORE = re.compile(r"(?:(?<![^\s.])\([\w.:-]{1,60}(?: rank=\d+)? pid=\d+[^)]{0,80}\) ?){1,2}$")
_FLAT_TRACEBACK = re.compile(
    r"(?<=\s)(?=File \"[^\"]{1,300}\", line \d+|Traceback \(most recent call last\)"
    r"|The above exception was|During handling of the above"
    r"|(?:[a-z_]\w*\.){0,6}[A-Z]\w*(?:Error|Exception): )"
)


def records(chunks: Iterable[str], first_number: int = 1) -> Iterator[LogRecord]:
    """The records of a log that comes in pieces of any size; ``first_number`` is its first line's."""
    for number, line in _numbered(chunks, first_number):
        for part in _parts(line):
            yield parse_record(number, part)


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
        if len(part) < 160:
            yield part
            continue
        for record in _cut(part):
            if "Traceback (most recent call last)" in record and 'File "' in record:
                yield from _FLAT_TRACEBACK.split(record)
            else:
                yield record


def _cut(line: str) -> Iterator[str]:
    begin = 0
    for match in _EMBEDDED.finditer(line):
        at = match.start()
        if process := _PROCESS_BEFORE.search(line, max(at - _PREFIX_CHARS, begin), at):
            at = process.start()
        # What stands in front of a line's first record is its prefix.
        if at > begin and (begin or not _only_prefixes(line[:at])):
            yield line[begin:at]
            begin = at
    yield line[begin:]


def _only_prefixes(text: str) -> bool:
    return len(text) < _PREFIX_CHARS and not parse_record(0, text).text.strip()


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
    level = _first_text(values, ("level", "levelname", "severity")).upper()
    if not message:
        return line
    return f"{level}: {message}" if level in {*QUIET_LEVELS, "ERROR", "CRITICAL"} else message


def _first_text(values: dict[str, object], names: tuple[str, ...]) -> str:
    return next((value for name in names if isinstance(value := values.get(name), str)), "")


def parse_record(number: int, raw: str) -> LogRecord:
    """One line with its prefixes taken off."""
    text = raw[:_RECORD_CHARS]
    if "\x1b" in text:
        text = _ANSI.sub("", text)
    if "m" in text and "[" in text:
        text = _BARE_COLOUR.sub("", text)
    text = _CONTROL.sub("", text).rstrip()
    process = level = source = ""
    at = 0
    for _ in range(_MOST_PREFIXES):
        if match := _VLLM.match(text, at):
            level, source = match[1], match[2].rsplit("/", 1)[-1]
        elif match := _PROCESS.match(text, at):
            process = f"{match[1]}{match[2] or ''}" if match[1] else match[3] or match[4]
        elif match := _RAY_CORE.match(text, at) or _GLOG.match(text, at):
            level = _LEVELS.get(match[1], "ERROR")
        elif match := _LEVEL.match(text, at):
            level = _LEVELS.get(match[1], match[1])
        else:
            match = _DEPLOYMENT.match(text, at)
            if match is None:
                break
        at = match.end()
        if source:
            break
    return LogRecord(number, text[at:], process, level, source, bool(process or level))
