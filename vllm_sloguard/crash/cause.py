"""Finds why an engine exited in the records of its log, in one pass and bounded memory.

A failed start prints its cause once, where it happened, and every process on the way up wraps it again; the last line
is never the cause. So the earliest root in time over all processes wins: a text that names its cause, an exception of
the start or of the engine's processes, a native signal, a timeout. What only reports the end of something else counts
where there is no root.
"""

import re
from dataclasses import dataclass, replace

from vllm_sloguard.crash import texts
from vllm_sloguard.crash.kinds import Category
from vllm_sloguard.crash.prefixes import QUIET_LEVELS, LogRecord
from vllm_sloguard.crash.ranks import ROOT_RANKS, CauseRank, TextMeaning, category_of, meaning_of, with_signal_name

_MAX_TRACEBACKS = 4096
_WRAPPED_WIDTH = 60  # the narrowest terminal
_VALIDATION_LINES = 12
_EVIDENCE_CHARS = 2000
_RESTATED_WITHIN = 400  # records between a message and the exception line that repeats it


@dataclass(frozen=True)
class CauseLine:
    """A line that may be the cause. ``category`` None: the phase decides."""

    rank: CauseRank
    category: Category | None
    evidence: str
    process: str
    number: int
    order: int


@dataclass
class _Traceback:
    """The state of one process's output."""

    header: str = ""
    inside: bool = False
    chained: str = ""
    first: CauseLine | None = None
    of_request: bool = False
    ignored: bool = False
    of_logging: bool = False


class CauseFinder:
    """Reads records and keeps the best evidence. ``phase`` None: taken from the log."""

    def __init__(self, phase: str | None) -> None:
        self._given_phase = phase
        self._order = 0
        self._previous_run: tuple[CauseLine, str] | None = None
        self._begin_run()

    def _begin_run(self) -> None:
        self._serving = self._given_phase not in {None, "starting"}
        self._start_seen = False
        self._best: dict[CauseRank, CauseLine] = {}
        self._tracebacks: dict[tuple[str, str], _Traceback] = {}
        self._last: LogRecord | None = None
        self._growing: CauseLine | None = None
        self._growing_level = ""
        self._to_grow = 0

    def result(self) -> tuple[CauseLine | None, str]:
        """The cause of the last run that has one, and the phase in which it ended."""
        cause = self._choose()
        # A death in a log that shows no start: its beginning is missing.
        served = self._serving or (cause is not None and cause.rank is CauseRank.DEATH and not self._start_seen)
        phase = self._given_phase or ("serving" if served else "starting")
        if cause is None and self._previous_run is not None:
            return self._previous_run
        return cause, phase

    def feed(self, record: LogRecord) -> None:
        """Takes the next record into account."""
        self._order += 1
        self._follow_runs(record)
        text = record.text.strip()
        if record.level in QUIET_LEVELS:
            if record.level == "WARNING" and texts.DEATH_TEXTS.search(text):
                self._add(TextMeaning(CauseRank.DEATH, None), text, record)
            elif record.level == "INFO" and texts.STOPS.search(text):
                self._add(TextMeaning(CauseRank.STOPPED, None), text, record)
            self._last = None
            self._growing = None
            return
        if not text or self._grow(record, text):
            return
        state = self._traceback(record)
        if _is_source(record.text, text, inside=state.inside):
            return
        if self._chain(state, text):
            return
        if texts.TRACEBACK in text and not texts.QUOTED.search(text):
            self._enter(state, record)
            return
        self._consider(record, text, state)
        self._last = record

    def _follow_runs(self, record: LogRecord) -> None:
        if self._given_phase is None:
            if not self._serving:
                self._serving = bool(texts.SERVING_MARKS.search(record.text))
                self._start_seen = self._start_seen or bool(texts.START_EVIDENCE.search(record.text))
            elif texts.STARTING_MARKS.search(record.text):
                self._serving, self._start_seen = False, True
        if "vLLM" in record.text or "LLM engine" in record.text or "non-default" in record.text:
            ended = self._best.keys() - {CauseRank.ERROR, CauseRank.WRAPPER}
            if ended and texts.STARTING_HEADER.search(record.text):
                cause, phase = self.result()
                if cause is not None and cause.rank is not CauseRank.STOPPED:
                    self._previous_run = cause, phase
                self._begin_run()

    def _starting(self) -> bool:
        return self._start_seen and not self._serving

    # Tracebacks

    def _traceback(self, record: LogRecord) -> _Traceback:
        key = record.process, record.source
        state = self._tracebacks.get(key)
        if state is None:
            if len(self._tracebacks) >= _MAX_TRACEBACKS:
                self._tracebacks.clear()
            state = self._tracebacks[key] = _Traceback()
        return state

    @staticmethod
    def _chain(state: _Traceback, text: str) -> bool:
        if texts.DIRECT_CAUSE in text:
            state.chained = "direct"
        elif texts.DURING_HANDLING in text:
            state.chained = "handling"
        else:
            return False
        return True

    def _enter(self, state: _Traceback, record: LogRecord) -> None:
        state.inside = True
        if not state.chained:
            state.first = None
            state.of_request = self._of_request(record, state.header)
            state.ignored = bool(texts.IGNORED_HEADERS.search(state.header))
            state.of_logging = texts.LOGGING_ERROR in state.header

    def _of_request(self, record: LogRecord, header: str) -> bool:
        if texts.REQUEST_HEADERS.search(header):
            return True
        return self._serving and (
            record.process.lower().startswith("apiserver") or bool(texts.REQUEST_SOURCES.match(record.source))
        )

    # Causes

    def _consider(self, record: LogRecord, text: str, state: _Traceback) -> None:
        ends_traceback = state.inside and bool(texts.TRACEBACK_END.match(text))
        if not (ends_traceback or record.level or texts.has_keyword(text)):
            if not state.inside:
                state.of_request = self._of_request(record, "")
            self._unwrap(record, text)
            state.header = text[:300]
            return
        if texts.NOISE.search(text) or texts.IGNORED_HEADERS.search(text):
            state.header = text[:300]
            return
        if state.ignored and (ends_traceback or texts.EXCEPTION_LINE.match(text)):
            self._leave_ignored(record, text, state)
            return
        if not state.inside and not text.startswith(texts.HEADER_DETAILS):
            state.of_request = self._of_request(record, text)
        ends = ends_traceback or bool(texts.EXCEPTION_LINE.match(text))
        if match := texts.QUOTED.search(text):
            quote = next((group for group in match.groups() if group), "")
            evidence = text if "original error" in text else quote
            self._take(_meaning_of_quote(quote), evidence, record, state)
        elif meaning := self._meaning(record, text, state, ends_traceback=ends):
            self._take(meaning, with_signal_name(text), record, state)
        else:
            self._unwrap(record, text)
        if not text.startswith(texts.HEADER_DETAILS):
            state.header = text[:300]
        if ends:
            state.inside, state.chained, state.header = False, "", ""

    def _leave_ignored(self, record: LogRecord, text: str, state: _Traceback) -> None:
        if state.of_logging and (meaning := _device_failure(text)):
            self._add(meaning, text, record)
        state.inside = state.ignored = False
        state.header = ""

    def _meaning(self, record: LogRecord, text: str, state: _Traceback, *, ends_traceback: bool) -> TextMeaning | None:
        known = meaning_of(text)
        if known is not None:
            if state.of_request and known.rank in {CauseRank.MEMORY, CauseRank.DEVICE, CauseRank.TIMEOUT}:
                return TextMeaning(CauseRank.CHAINED, known.category)
            return None if state.of_request and "validation error" in text else known
        if state.of_request:
            # Before the first request, a task that failed is the best evidence if nothing else is.
            return TextMeaning(CauseRank.ERROR, None) if ends_traceback and self._starting() else None
        return _unknown_meaning(record, text, ends_traceback=ends_traceback)

    def _take(self, meaning: TextMeaning, evidence: str, record: LogRecord, state: _Traceback) -> None:
        first = state.first if state.chained else None
        rank, category = meaning.rank, meaning.category
        if first is not None and rank in ROOT_RANKS:
            if self._informs(first, rank, evidence, state.chained):
                self._swap(first, CauseLine(rank, category, evidence, record.process, record.number, first.order))
                return
            rank = CauseRank.CHAINED
        line = self._add(TextMeaning(rank, category), evidence, record)
        if rank in ROOT_RANKS and not state.chained:
            state.first = line

    @staticmethod
    def _informs(first: CauseLine, rank: CauseRank, evidence: str, chained: str) -> bool:
        """Whether an exception raised from ``first`` is more informative."""
        if first.rank is CauseRank.EXCEPTION and rank in {CauseRank.MEMORY, CauseRank.DEVICE}:
            return True
        if first.rank is CauseRank.TIMEOUT and ":" not in first.evidence:
            return rank is CauseRank.TIMEOUT and ":" in evidence
        return chained == "handling" and bool(texts.TERSE_EXCEPTION.match(first.evidence))

    def _add(self, meaning: TextMeaning, evidence: str, record: LogRecord) -> CauseLine:
        rank = meaning.rank
        evidence = evidence[:_EVIDENCE_CHARS]
        line = CauseLine(rank, meaning.category, evidence, record.process, record.number, self._order)
        kept = self._best.get(rank)
        if kept is None or rank is CauseRank.ERROR:
            self._best[rank] = line
        elif self._restates(kept, line):
            line = replace(line, order=kept.order)
            self._best[rank] = line
        if header := _VALIDATION.search(evidence):
            line = self._swap(line, replace(line, evidence=header[1]))
            self._growing, self._growing_level, self._to_grow = line, record.level, _VALIDATION_LINES
        elif evidence.endswith(":") and texts.EXCEPTION_LINE.match(evidence):
            self._growing, self._growing_level, self._to_grow = line, record.level, 1
        return line

    @staticmethod
    def _restates(kept: CauseLine, line: CauseLine) -> bool:
        """Whether ``line`` is the exception whose bare message was kept before."""
        return (
            line.order - kept.order < _RESTATED_WITHIN
            and line.evidence.endswith(f": {kept.evidence}")
            and not texts.EXCEPTION_LINE.match(kept.evidence)
            and bool(texts.EXCEPTION_LINE.match(line.evidence))
        )

    def _swap(self, old: CauseLine, new: CauseLine) -> CauseLine:
        if self._best.get(old.rank) is old:
            del self._best[old.rank]
            kept = self._best.get(new.rank)
            if kept is None or new.order <= kept.order:
                self._best[new.rank] = new
        for state in self._tracebacks.values():
            if state.first is old:
                state.first = new
        return new

    def _grow(self, record: LogRecord, text: str) -> bool:
        """Appends the lines of a multi-line message, such as pydantic's, to its header, without the repeated input."""
        line = self._growing
        if line is None:
            return False
        self._to_grow -= 1
        unfinished = line.evidence.endswith(":")
        if (
            self._to_grow < 0
            or (record.process, record.level) != (line.process, self._growing_level)
            or texts.TRACEBACK in text
            or (texts.EXCEPTION_LINE.match(text) and not unfinished)
            or text.startswith("For further information")
        ):
            self._growing = None
            return text.startswith("For further information")
        header = ": " not in line.evidence and not line.evidence.endswith(":")
        piece = text.partition(" [type=")[0]
        number = record.number if header or line.evidence.endswith(":") else line.number
        grown = replace(
            line, evidence=f"{line.evidence}{':' if header else ''} {piece}"[:_EVIDENCE_CHARS], number=number
        )
        self._growing = self._swap(line, grown)
        return True

    def _unwrap(self, record: LogRecord, text: str) -> None:
        """Recognises a known text that was wrapped at the width of a terminal."""
        last = self._last
        if last is None or record.prefixed or last.width < _WRAPPED_WIDTH:
            return
        start = last.text.strip()
        for joined in (start + text, f"{start} {text}"):
            meaning = meaning_of(joined)
            if meaning is None or meaning.rank not in ROOT_RANKS or texts.WRAPPERS.search(joined):
                continue
            mistaken = self._best.get(CauseRank.EXCEPTION)
            if mistaken is not None and mistaken.number == last.number:
                del self._best[CauseRank.EXCEPTION]
            self._add(meaning, joined, last)
            return

    # The choice

    def _before_stop(self) -> dict[CauseRank, CauseLine]:
        """The best lines, without those that follow a request to stop."""
        stop = self._best.get(CauseRank.STOPPED)
        if stop is None:
            return self._best
        best = {rank: line for rank, line in self._best.items() if line.order <= stop.order}
        if CauseRank.DEATH in best:
            # The API server stops what is left of an engine that has died.
            del best[CauseRank.STOPPED]
        return best

    def _choose(self) -> CauseLine | None:
        best = self._before_stop()
        roots = [best[rank] for rank in ROOT_RANKS if rank in best]
        if roots:
            first = min(roots, key=lambda line: line.order)
            # A hang is reported before what caused it, and NCCL's error before the call that failed.
            if first.rank is CauseRank.TIMEOUT:
                death = best.get(CauseRank.DEATH)
                died = death if death is not None and death.order < first.order else None
                return best.get(CauseRank.MEMORY) or best.get(CauseRank.DEVICE) or died or first
            return best.get(CauseRank.MEMORY, first) if first.rank is CauseRank.NCCL else first
        order = [CauseRank(rank) for rank in range(CauseRank.ABORT, CauseRank.WRAPPER + 1)]
        error = best.get(CauseRank.ERROR)
        if error is not None and not self._serving and error.process.startswith(("EngineCore", "Worker", "VllmWorker")):
            order.remove(CauseRank.ERROR)
            order.insert(order.index(CauseRank.DEATH), CauseRank.ERROR)
        return next((best[rank] for rank in order if rank in best), None)


def _unknown_meaning(record: LogRecord, text: str, *, ends_traceback: bool) -> TextMeaning | None:
    """The meaning of a text that matches no pattern, from its position and level."""
    rank = None
    if texts.FAILED_COMMANDS.search(text):
        rank = CauseRank.CHAINED
    elif texts.WRAPPERS.search(text):
        reports_failure = record.level or (ends_traceback and " failed " in text)
        rank = CauseRank.WRAPPER if reports_failure else None
    elif ends_traceback or texts.CPP_WHAT.match(text):
        rank = CauseRank.EXCEPTION
    elif record.level or texts.ERROR_WORDS.search(text):
        rank = CauseRank.ERROR
    return None if rank is None else TextMeaning(rank, None)


def _meaning_of_quote(quote: str) -> TextMeaning:
    meaning = meaning_of(quote)
    if meaning is not None and meaning.rank is CauseRank.DEATH:
        return meaning
    return TextMeaning(CauseRank.QUOTED, category_of(quote))


def _device_failure(text: str) -> TextMeaning | None:
    meaning = meaning_of(text)
    return meaning if meaning is not None and meaning.rank in {CauseRank.MEMORY, CauseRank.DEVICE} else None


_VALIDATION = re.compile(r"(\d+ validation errors? for \w+)$")


def _is_source(raw: str, text: str, *, inside: bool) -> bool:
    """Whether a line is a frame or a source line of a traceback. C++ and pydantic indent their messages, too."""
    if text.startswith(('File "', "raise ", "File “", "~", "^")) or not text.strip("^~ "):
        return True
    if inside and text[0] in "\"'([{)]}" and not text.startswith("[Errno"):
        return True
    if inside and text.startswith(('f"', "f'", "return ", "self.", "await ", "with ", "assert ")):
        return True
    return raw[0].isspace() and not text.startswith(
        ("what():", "Value error, ", "Assertion failed, ", "Reason: ", "Exit Code: ")
    )
