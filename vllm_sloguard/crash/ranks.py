"""What a line of a log means, by its text alone."""

import re
from dataclasses import dataclass
from enum import IntEnum

from vllm_sloguard.crash import texts
from vllm_sloguard.crash.kinds import Category


class CauseRank(IntEnum):
    """The roots come first, up to NCCL; among them the earliest in time is the cause."""

    MEMORY = 0
    DEVICE = 1
    START = 2
    EXCEPTION = 3
    SIGNAL = 4
    TIMEOUT = 5
    NCCL = 6
    ABORT = 7
    QUOTED = 8
    CHAINED = 9
    HOST_KILL = 10
    STOPPED = 11
    COLLATERAL = 12
    DEATH = 13
    ERROR = 14
    WRAPPER = 15


ROOT_RANKS = frozenset(rank for rank in CauseRank if rank <= CauseRank.NCCL)


@dataclass(frozen=True)
class TextMeaning:
    """``category`` None: the phase decides."""

    rank: CauseRank
    category: Category | None


# The first that matches: "CUDA error: out of memory" is a memory failure.
_MEANINGS: tuple[tuple[re.Pattern[str], TextMeaning], ...] = (
    (texts.MEMORY_TEXTS, TextMeaning(CauseRank.MEMORY, Category.OUT_OF_MEMORY)),
    (texts.NATIVE_SIGNALS, TextMeaning(CauseRank.SIGNAL, Category.ENGINE_DEATH)),
    (texts.STOPS, TextMeaning(CauseRank.STOPPED, None)),
    (texts.COLLATERAL, TextMeaning(CauseRank.COLLATERAL, None)),
    (texts.START_TEXTS, TextMeaning(CauseRank.START, Category.STARTUP_FAILURE)),
    (texts.NCCL_ERRORS, TextMeaning(CauseRank.NCCL, Category.CUDA_ERROR)),
    (texts.DEVICE_TEXTS, TextMeaning(CauseRank.DEVICE, Category.CUDA_ERROR)),
    (texts.TIMEOUT_TEXTS, TextMeaning(CauseRank.TIMEOUT, Category.TIMEOUT)),
    (texts.ABORTS, TextMeaning(CauseRank.ABORT, Category.ENGINE_DEATH)),
    (texts.SIGNAL_EXITS, TextMeaning(CauseRank.HOST_KILL, Category.ENGINE_DEATH)),
    (texts.HOST_KILLS, TextMeaning(CauseRank.HOST_KILL, Category.OUT_OF_MEMORY)),
    (texts.DEATH_TEXTS, TextMeaning(CauseRank.DEATH, None)),
)
_DEATH = TextMeaning(CauseRank.DEATH, None)


def meaning_of(text: str) -> TextMeaning | None:
    """The meaning of ``text``; None if it matches no pattern."""
    if not texts.has_keyword(text):
        return None
    if texts.SUPPOSITIONS.search(text):
        return _DEATH if texts.DEATH_TEXTS.search(text) else None
    if "RayTaskError" in text:
        return TextMeaning(CauseRank.QUOTED, category_of(text))
    found = next((meaning for pattern, meaning in _MEANINGS if pattern.search(text)), None)
    if found is not None and found.rank is CauseRank.COLLATERAL and texts.NCCL_ERRORS.search(text):
        return TextMeaning(CauseRank.COLLATERAL, Category.CUDA_ERROR)
    return found


def category_of(text: str) -> Category | None:
    """The category of ``text``; None if it has none of its own."""
    return next((meaning.category for pattern, meaning in _MEANINGS if pattern.search(text)), None)


def with_signal_name(text: str) -> str:
    """``text`` with the name of the native signal that it describes in words."""
    match = texts.NATIVE_SIGNALS.search(text)
    words = next((group for group in match.groups() if group), "") if match else ""
    name = texts.SIGNAL_NAMES.get(words, "")
    return f"{text} ({name})" if name and name not in text else text
