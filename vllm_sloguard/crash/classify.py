"""Classifies a log: the category of its crash, the line that shows the cause, the process and the phase."""

import io
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from vllm_sloguard.crash.cause import CauseFinder, CauseLine
from vllm_sloguard.crash.kinds import Category, Crash
from vllm_sloguard.crash.log_records import records
from vllm_sloguard.crash.prefixes import LogRecord
from vllm_sloguard.crash.ranks import CauseRank

_EVIDENCE_CHARS = 500
_CHUNK_CHARS = 1 << 16
_SKIPPED_BYTES = 1 << 20
_MAX_COUNTED_BYTES = 1 << 28
_EXIT_OF_KILLED_CONTAINER = 128 + signal.SIGKILL
# Ranks that report an exit without its reason.
_SILENT = frozenset({CauseRank.DEATH, CauseRank.WRAPPER})
# Ranks that take precedence over a deadline of the caller's.
_NAMED = frozenset({CauseRank.MEMORY, CauseRank.DEVICE, CauseRank.START, CauseRank.SIGNAL, CauseRank.NCCL})


def classify(log_text: str, *, phase: str | None = None, exit_code: int | None, timed_out: bool = False) -> Crash:
    """Why an engine exited.

    ``phase`` is "starting" until the engine is healthy, anything else afterwards; None takes it from the log.
    ``exit_code`` is the API server's, as in subprocess (negative: a signal), None if it is running or unknown.
    ``timed_out``: a deadline of the caller passed; a cause named in the log takes precedence.
    """
    chunks = (log_text[at : at + _CHUNK_CHARS] for at in range(0, len(log_text), _CHUNK_CHARS))
    return classify_stream(chunks, phase=phase, exit_code=exit_code, timed_out=timed_out)


def classify_file(
    path: Path,
    *,
    phase: str | None = None,
    exit_code: int | None,
    timed_out: bool = False,
    tail_bytes: int | None = None,
) -> Crash:
    """The same for a file of any size; ``tail_bytes`` limits it to the end. Raises OSError."""
    with path.open("rb") as log:
        first_number = 1 if tail_bytes is None else _skip(log, max(path.stat().st_size - tail_bytes, 0)) + 1
        with io.TextIOWrapper(log, encoding="utf-8", errors="replace", newline="") as text:
            chunks = iter(lambda: text.read(_CHUNK_CHARS), "")
            return classify_stream(
                chunks, phase=phase, exit_code=exit_code, timed_out=timed_out, first_number=first_number
            )


def _skip(log: BinaryIO, size: int) -> int:
    """Skips ``size`` bytes and returns the number of lines in them, 0 if there are too many bytes to count."""
    if size > _MAX_COUNTED_BYTES:
        log.seek(size)
        return 0
    lines = 0
    while size > 0 and (chunk := log.read(min(size, _SKIPPED_BYTES))):
        size -= len(chunk)
        lines += chunk.count(b"\n")
    return lines


def classify_stream(
    chunks: Iterable[str],
    *,
    phase: str | None = None,
    exit_code: int | None,
    timed_out: bool = False,
    first_number: int = 1,
) -> Crash:
    """The same for a log in chunks. One pass: linear time, bounded memory."""
    finder = CauseFinder(phase)
    last: deque[LogRecord] = deque(maxlen=1)
    for record in _with_text(records(chunks, first_number)):
        finder.feed(record)
        last.append(record)
    cause, phase = finder.result()
    if timed_out and (cause is None or cause.rank not in _NAMED):
        line = last[0].text.strip() if last else "none"
        evidence = f"the deadline passed while {phase}; last line: {line}"
        return Crash(Category.TIMEOUT, _trim(evidence), cause.process if cause else "", phase, exit_code)
    if cause is None or (cause.rank is CauseRank.ERROR and exit_code == _EXIT_OF_KILLED_CONTAINER):
        return Crash(_category_of_exit(phase, exit_code), _silence(exit_code), "", phase, exit_code)
    return Crash(_category(cause, phase), _evidence(cause, exit_code), cause.process, phase, exit_code, cause.number)


def _with_text(lines: Iterable[LogRecord]) -> Iterator[LogRecord]:
    return (line for line in lines if line.text)


def _category(cause: CauseLine, phase: str) -> Category:
    return cause.category or _category_of(phase)


def _category_of(phase: str) -> Category:
    return Category.STARTUP_FAILURE if phase == "starting" else Category.ENGINE_DEATH


def _category_of_exit(phase: str, exit_code: int | None) -> Category:
    return Category.OUT_OF_MEMORY if exit_code == _EXIT_OF_KILLED_CONTAINER else _category_of(phase)


def _evidence(cause: CauseLine, exit_code: int | None) -> str:
    if cause.rank in _SILENT and exit_code is not None:
        return f"{_trim(cause.evidence)} ({_exit(exit_code)})"
    return _trim(cause.evidence)


def _silence(exit_code: int | None) -> str:
    return f"{_exit(exit_code)}; nothing in the log says why"


def _exit(exit_code: int | None) -> str:
    if exit_code is None:
        return "no exit code"
    if exit_code == 0:
        return "unexpected exit, code 0"
    if exit_code < 0:
        return f"exit code {exit_code}, {_signal(-exit_code)}"
    if exit_code > 128:
        return f"exit code {exit_code}, 128 + {_signal(exit_code - 128)}"
    return f"exit code {exit_code}"


def _signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name}, often the kernel's when memory runs out" if name == "SIGKILL" else name


def _trim(text: str) -> str:
    return text if len(text) <= _EVIDENCE_CHARS else text[: _EVIDENCE_CHARS - 1] + "…"
