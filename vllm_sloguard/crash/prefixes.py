"""Strips the prefixes of a line: vLLM's own, Ray's, glog's, and those of whatever shows or collects the log."""

import re
from typing import NamedTuple

# No text that names a cause starts later in a record; a longer one is a dump.
_RECORD_CHARS = 4000
_MAX_PREFIXES = 8
_PREFIX_CHARS = 300
_FOREIGN_CHARS = 160


class LogRecord(NamedTuple):
    """One line of a log. ``text`` keeps its indentation; ``prefixed`` is set if vLLM's own prefix was there.

    ``width`` is the length of the line with all prefixes.
    """

    number: int
    text: str
    process: str
    level: str
    source: str
    prefixed: bool
    width: int


_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\].{0,100}?(?:\x07|\x1b\\)")
# Ray's colours in logs that lost their escape characters.
_BARE_COLOUR = re.compile(r"(?:^|(?<=[\s)\]]))\[\d{1,2}(?:;\d{1,2})?m|\[0m|\[39m")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufeff]")

_TIME = r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z| ?[+-]\d\d:?\d\d)?"
# What stands in front of vLLM's own prefix: container runtimes, log collectors, tools that show logs.
_DEPLOYMENT = re.compile(
    rf"(?:[\w./-]{{1,100}}\s{{1,40}}\|\s?"  # docker compose
    rf"|\[(?:pod/[\w./-]{{1,200}}|vllm[\w-]{{0,40}})\]:?\s(?:\|\s)?"  # kubectl logs --prefix
    rf"|{_TIME}\s(?:stdout|stderr)\s[FP]\s?"  # CRI
    rf"|\[?{_TIME}\]?:?\s"
    r"|[A-Z][a-z]{2}\s{1,2}\d{1,2}\s\d\d:\d\d:\d\d(?:\.\d+)?\s[\w.-]{1,100}\s[\w.@:/-]{1,100}(?:\[\d+\])?:\s?"  # syslog
    r"|[│|]\s?)"
)
_RANK = r"(?: (?:rank=)?(?:TP|PP|DP|EP)?\d+[\w_]{0,20})"
_PROCESS = re.compile(
    rf"\(([\w.:/-]{{1,80}})(?: \+\S{{1,20}})?({_RANK})? pid=\d+(?:, [^)]{{1,100}})?\)\s?"
    r"|\((raylet|autoscaler|pid=\d+)[^)]{0,100}\)\s?"
    r"|\[(rank ?\d+)\]:\s?"
    r"|\(((?:API[Ss]erver|ApiServer|EngineCore|Worker|VllmWorker)\w{0,40})\)\s"
)
_RAY_CORE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ ([A-Z]) \d+ \d+\] (?:\(\w+\) )?[\w./-]{1,80}:\d+: ?")
_GLOG = re.compile(r"\[?([EWIF])(?:\d{3,4} \d\d:\d\d:\d\d[.\d]*(?: +\d+)?)? [\w./-]{1,100}:\d+\]\s?")
_VLLM = re.compile(
    r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) "
    r"(?:\d\d-\d\d [\d:.]+ \[?([^\]\s]{1,100}?)(?::\d+)?|(?:\d{1,8} )?\[([\w./<>-]{1,100}):\d+)\]\s?"
)
_LEVEL = re.compile(
    r"(?:\| )?(?:[\w.]{1,80} - |\[)?(DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL|FATAL)"
    r"(?::[A-Za-z][\w.]{0,60}:(?=\S)|\s*(?:\]|:|\||-)(?=\s|$)|\s+[\w.]{1,60}\.py:\d+ (?:--|\])(?=\s|$)"
    r"|\s\d{4}-\d\d-\d\d [\d:,.]{8,15} [\w.:#-]{1,80}(?: [\w.:#-]{1,80}){0,2} --(?=\s))\s*"  # Ray Serve
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
QUIET_LEVELS = frozenset({"DEBUG", "INFO", "WARNING"})
_TRACEBACK = "Traceback (most recent call last)"
# The start of a record within a line: a log that was pasted on one line, or wrapped at a terminal's width.
EMBEDDED_RECORD = re.compile(r"\b(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d")
_LEVEL_WORDS = frozenset({"DEBUG", "INFO", "NOTICE", "WARN", "WARNING", "ERROR", "CRITICAL", "FATAL", "DEFAULT"})
# Text in front of a record that is no prefix: an exception, a quotation or a sentence.
NO_PREFIX = re.compile(r"['\"{}]|\w(?:Error|Exception)\b|[a-z]{2,} [a-z]{2,} [a-z]{2,}")
_PROCESS_BEFORE = re.compile(rf"(?:(?<![^\s.])\([\w.:-]{{1,60}}{_RANK}? pid=\d+[^)]{{0,80}}\) ?){{1,3}}$")


class PrefixParser:
    """Parses lines one after another.

    A prefix of unknown shape is learned from a line where vLLM's own prefix or a traceback follows it. A collector that
    shows a traceback as INFO gives every line that level, so its levels are ignored from then on.
    """

    def __init__(self) -> None:
        self._learned: re.Pattern[str] | None = None
        self._levels_ignored = False
        self._indent = 0

    def parse(self, number: int, raw: str) -> LogRecord:
        """One line without its prefixes."""
        text = _printable(raw[:_RECORD_CHARS])
        width = len(text)
        if self._indent and text[: self._indent].isspace():
            text = text[self._indent :]
        record = _stripped(number, text, 0, width)
        if record.source:
            return record
        if not record.process:
            record = self._without_foreign_prefix(record)
        if record.level in QUIET_LEVELS and not record.source:
            self._levels_ignored = self._levels_ignored or record.text.startswith(_TRACEBACK)
            if self._levels_ignored:
                return record._replace(level="", prefixed=bool(record.process))
        return record

    def _without_foreign_prefix(self, record: LogRecord) -> LogRecord:
        number, text, width = record.number, record.text, record.width
        if self._learned is not None and (match := self._learned.match(text)):
            return _stripped(number, text, match.end(), width)
        at = record_start(text, 0, _FOREIGN_CHARS)
        if at > 0 and text[:at].isspace():
            # Pasted into a list, say: every line is indented.
            self._indent = at
            return _stripped(number, text, at, width)
        if at < 0 and self._learned is None:
            at = text.find(_TRACEBACK, 0, _FOREIGN_CHARS)
        if at > 0 and text[:at].strip() and not NO_PREFIX.search(text, 0, at):
            self._learned = _shape(text[:at])
            return _stripped(number, text, at, width)
        return record


def record_start(text: str, begin: int, end: int) -> int:
    """Where the first of vLLM's own records starts in ``text``; -1 where there is none."""
    match = EMBEDDED_RECORD.search(text, begin, end)
    return -1 if match is None else start_with_process(text, begin, match.start())


def start_with_process(text: str, begin: int, at: int) -> int:
    """``at``, or where the names of processes in front of it start."""
    process = _PROCESS_BEFORE.search(text, max(at - _PREFIX_CHARS, begin), at)
    return at if process is None else process.start()


def _printable(text: str) -> str:
    if "\x1b" in text:
        text = _ANSI.sub("", text)
    if "m" in text and "[" in text:
        text = _BARE_COLOUR.sub("", text)
    return _CONTROL.sub("", text).rstrip()


def _shape(prefix: str) -> re.Pattern[str]:
    """A pattern for prefixes like this one: levels and whatever holds a digit vary from line to line."""
    return re.compile(
        r"\s*" + r"\s+".join(map(_varied, prefix.split())) + (r"(?:\s|$)" if prefix[-1].isspace() else "")
    )


def _varied(word: str) -> str:
    if any(char.isdigit() for char in word):
        return r"\S+"
    return r"\W?[A-Za-z]+\W?" if word.strip("[]():|").upper() in _LEVEL_WORDS else re.escape(word)


def _stripped(number: int, text: str, at: int, width: int) -> LogRecord:
    process = level = source = ""
    for _ in range(_MAX_PREFIXES):
        if match := _VLLM.match(text, at):
            level, source = match[1], (match[2] or match[3]).rsplit("/", 1)[-1]
        elif match := _PROCESS.match(text, at):
            process = f"{match[1]}{match[2] or ''}" if match[1] else match[3] or match[4] or match[5]
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
    return LogRecord(number, text[at:], process, level, source, bool(process or level), width)
