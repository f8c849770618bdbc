"""Why an engine ended: one category and one line of evidence, read from its output.

vLLM's last line is never the cause. A failed start prints the cause once where it happened and then wraps it in every
process on the way up; a dead engine ends the API server with exit code 0. So the whole log is read, each line that
could be a cause gets a rank, and the first of the best rank wins.
"""

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, StrEnum

_EVIDENCE_CHARS = 500
# No text that names a cause starts later in a line; a longer line is a dump.
_LINE_CHARS = 4000


class Category(StrEnum):
    """The four of the SLO-Guard study, and an engine that died while serving without saying why."""

    OUT_OF_MEMORY = "out_of_memory"
    CUDA_ERROR = "cuda_error"
    STARTUP_FAILURE = "startup_failure"
    TIMEOUT = "timeout"
    ENGINE_DEATH = "engine_death"


@dataclass(frozen=True)
class Crash:
    """An engine's end. ``process`` is the name in the log's prefix, "" where the line had none."""

    category: Category
    evidence: str
    process: str
    phase: str
    exit_code: int | None


class _Rank(IntEnum):
    """How well a line explains the end; lower is better."""

    KNOWN = 0
    EXCEPTION = 1
    TIMEOUT = 2
    QUOTED = 3
    DEATH = 4


@dataclass(frozen=True)
class _Line:
    """One line of the log without its prefix."""

    text: str
    process: str
    level: str


@dataclass(frozen=True)
class _Cause:
    rank: _Rank
    category: Category | None  # None: the phase decides
    evidence: str
    process: str


# Causes with a text of their own. The order matters: "CUDA error: out of memory" is a memory failure first.
KNOWN: tuple[tuple[Category, re.Pattern[str]], ...] = (
    (
        Category.OUT_OF_MEMORY,
        re.compile(
            r"Free memory on device .{0,80}on startup is less than"
            r"|Available memory on node .{0,120}is less than"
            r"|No available memory for the cache blocks"
            r"|To serve at least one request with the model's max seq len"
            r"|Cannot auto-fit max_model_len"
            r"|Failed to load model - not enough GPU memory"
            r"|\bOutOfMemoryError\b"
            r"|CUDA out of memory"
            r"|CUDA error: out of memory"
            r"|Cuda failure \d* ?'out of memory'"
            r"|cudaErrorMemoryAllocation\b"
            r"|CUBLAS_STATUS_ALLOC_FAILED"
            r"|Error in memory profiling"
            r"|DefaultCPUAllocator: can't allocate memory"
            r"|\[Errno 12\] Cannot allocate memory"
            r"|^MemoryError\b"
        ),
    ),
    (
        Category.CUDA_ERROR,
        re.compile(
            r"CUDA error:"
            r"|CUDA driver error:"
            r"|\bCUBLAS_STATUS_[A-Z]"
            r"|\bCUDNN_STATUS_[A-Z]"
            r"|\bcudaError[A-Z]\w+"
            r"|\bCUDA_ERROR_[A-Z]"
            r"|\bNCCL error\b"
            r"|\bncclUnhandledCudaError\b"
            r"|device-side assert"
        ),
    ),
    (Category.STARTUP_FAILURE, re.compile(r"^[\w./ -]{1,80}: error: ")),
    (Category.STARTUP_FAILURE, re.compile(r"\d+ validation errors? for \w+$")),
)
# What vLLM's processes say when they wait for each other in vain.
TIMEOUTS = re.compile(
    r"Timed out waiting for engine core processes"
    r"|RPC call to .{0,80} timed out"
    r"|Did not receive response from front-end"
)
# Its word for an engine that is dead, whatever of.
DEATHS = re.compile(
    r"EngineDeadError"
    r"|EngineCore encountered an issue"
    r"|engine core exited unexpectedly"
    r"|Worker proc .{0,80} died unexpectedly"
    r"|Failed core proc\(s\): \{[^}]"
)
_WRAPPER = re.compile(
    r"Engine core initialization failed\. See root cause above"
    r"|WorkerProc initialization failed due to an exception"
    # What a process says when another one has ended.
    r"|^RuntimeError: cancelled$"
    r"|CancelledError\b"
)
_QUOTED = re.compile(r"Worker failed with error '(.+?)'(?:, please check|$)")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.){0,8}[A-Z]\w*(?:Error|Exception|NotFound|Timeout|Failure)(?:: .*)?$")
_VALIDATION = re.compile(r"(\d+ validation errors? for \w+)$")
_VALIDATION_LINES = 12

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_PROCESS = re.compile(r"^\((\w{1,60}) pid=\d+\) ?")
_LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:.]+ \[[^\]]{1,80}\] ?")
_OTHER_LEVEL = re.compile(r"^(?:(DEBUG|INFO|WARNING):?\s|\[(?:I|W)\d{4}|[IW]\d{4} )")


def classify(log_text: str, *, phase: str, exit_code: int | None, timed_out: bool = False) -> Crash:
    """The cause of an engine's end.

    ``phase`` is "starting" until the engine was healthy, anything else after. ``exit_code`` is the API server's, as
    subprocess gives it (negative: a signal), None where it has not ended. ``timed_out`` says that a deadline of the
    caller's passed; a cause that the log names goes before it. Time is linear in the length of the log.
    """
    cause = _best(log_text, phase)
    if timed_out and (cause is None or cause.rank is not _Rank.KNOWN):
        evidence = f"the deadline passed while {phase}; last line: {_last_line(log_text) or 'none'}"
        return Crash(Category.TIMEOUT, _trim(evidence), cause.process if cause else "", phase, exit_code)
    if cause is None:
        return Crash(_category_of(phase), _silence(exit_code), "", phase, exit_code)
    category = cause.category or _category_of(phase)
    evidence = cause.evidence
    if cause.rank is _Rank.DEATH:
        evidence = f"{evidence} ({_silence(exit_code)})"
    return Crash(category, _trim(evidence), cause.process, phase, exit_code)


def _category_of(phase: str) -> Category:
    return Category.STARTUP_FAILURE if phase == "starting" else Category.ENGINE_DEATH


def _best(log_text: str, phase: str) -> _Cause | None:
    lines = [_parse(line) for line in log_text.replace("\r", "\n").split("\n")]
    best: _Cause | None = None
    for cause in _causes(lines, phase):
        if best is None or cause.rank < best.rank:
            best = cause
    return best


def _parse(raw: str) -> _Line:
    text = _CONTROL.sub("", _ANSI.sub("", raw[:_LINE_CHARS])).rstrip()
    process = ""
    if match := _PROCESS.match(text):
        process, text = match[1], text[match.end() :]
    if match := _LEVEL.match(text):
        return _Line(text[match.end() :], process, match[1])
    return _Line(text, process, "INFO" if _OTHER_LEVEL.match(text) else "")


def _causes(lines: list[_Line], phase: str) -> Iterator[_Cause]:
    for index, line in enumerate(lines):
        if DEATHS.search(line.text) and line.level != "INFO" and not line.text.startswith("    "):
            yield _Cause(_Rank.DEATH, None, line.text, line.process)
        elif line.level not in ("DEBUG", "INFO", "WARNING") and not _is_source(line.text):
            cause = _cause_of(line, phase)
            if cause is not None and _VALIDATION.search(line.text):
                cause = _Cause(cause.rank, cause.category, _validation(lines, index), line.process)
            if cause is not None:
                yield cause


def _is_source(text: str) -> bool:
    """Whether a line is a traceback's frame or source. C++ indents its cause too, but says ``what():``."""
    return not text or (text[0].isspace() and not text.lstrip().startswith("what():"))


def _cause_of(line: _Line, phase: str) -> _Cause | None:
    text, process = line.text.strip(), line.process
    if match := _QUOTED.search(text):
        return _Cause(_Rank.QUOTED, _known(match[1]), match[1], process)
    if _WRAPPER.search(text):
        return None
    if category := _known(text):
        return _Cause(_Rank.KNOWN, category, text, process)
    if TIMEOUTS.search(text):
        return _Cause(_Rank.TIMEOUT, Category.TIMEOUT, text, process)
    # An API server that serves also prints the exceptions of bad requests, and lives on.
    if _EXCEPTION.match(text) and (phase == "starting" or process.startswith(("EngineCore", "Worker"))):
        return _Cause(_Rank.EXCEPTION, None, text, process)
    return None


def _known(text: str) -> Category | None:
    return next((category for category, pattern in KNOWN if pattern.search(text)), None)


def _validation(lines: list[_Line], index: int) -> str:
    """Pydantic's header joined with the lines that say what was wrong, without the echo of the input."""
    header = _VALIDATION.search(lines[index].text)
    pieces: list[str] = []
    for line in lines[index + 1 : index + 1 + _VALIDATION_LINES]:
        text = line.text.strip()
        if not text or line.level or line.process != lines[index].process:
            break
        if not text.startswith("For further information"):
            pieces.append(text.partition(" [type=")[0])
    return f"{header[1] if header else ''}: {' '.join(pieces)}"


def _silence(exit_code: int | None) -> str:
    if exit_code is None:
        how = "no exit code"
    elif exit_code == 0:
        how = "exit code 0 that nobody asked for"
    elif exit_code < 0:
        how = f"exit code {exit_code}, {_signal(-exit_code)}"
    elif exit_code > 128:
        how = f"exit code {exit_code}, 128 + {_signal(exit_code - 128)}"
    else:
        how = f"exit code {exit_code}"
    return f"{how}; nothing in the log says why"


def _signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name}, which the kernel sends when memory runs out, as others do" if name == "SIGKILL" else name


def _last_line(log_text: str) -> str:
    tail = log_text[-_LINE_CHARS:].replace("\r", "\n").split("\n")
    return next((text for raw in reversed(tail) if (text := _parse(raw).text.strip())), "")


def _trim(text: str) -> str:
    return text if len(text) <= _EVIDENCE_CHARS else text[: _EVIDENCE_CHARS - 1] + "…"
