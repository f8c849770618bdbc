"""The keywords that the classifier looks for before its patterns: a text without any of them matches no pattern."""

import importlib
import re
from typing import Any

import pytest

from vllm_sloguard.crash import texts

PARSER: Any = importlib.import_module("re._parser")
OPS: Any = importlib.import_module("re._constants")
# Looked for in every record, or only matched at its start.
OTHERS = {
    "STARTING_HEADER",
    "SERVING_MARKS",
    "STARTING_MARKS",
    "START_EVIDENCE",
    "REQUEST_SOURCES",
    "TERSE_EXCEPTION",
    "TRACEBACK_END",
}
PATTERNS: dict[str, "re.Pattern[str]"] = {
    name: value for name, value in vars(texts).items() if type(value) is re.Pattern and name not in OTHERS
}


def literals(parsed: Any) -> list[list[str]]:
    """For each alternative of a pattern, the runs of characters that a match must hold, in lower case."""
    found: list[list[str]] = [[]]
    run = ""

    def both(alternatives: list[list[str]]) -> None:
        nonlocal found
        found = [one + other for one in found for other in alternatives]

    for op, value in parsed:
        if op is OPS.LITERAL:
            run += chr(value).lower()
            continue
        both([[run]])
        run = ""
        if op is OPS.BRANCH:
            both([one for branch in value[1] for one in literals(branch)])
        elif op is OPS.SUBPATTERN:
            both(literals(value[3]))
        elif op in {OPS.MAX_REPEAT, OPS.MIN_REPEAT} and value[0] > 0:
            both(literals(value[2]))
    both([[run]])
    return found


@pytest.mark.parametrize("name", PATTERNS)
def test_every_alternative_of_every_pattern_requires_a_keyword(name: str) -> None:
    pattern = PATTERNS[name]
    missed = [runs for runs in literals(PARSER.parse(pattern.pattern, pattern.flags)) if not has_keyword(runs)]
    assert missed == []


def has_keyword(runs: list[str]) -> bool:
    return any(texts.has_keyword(run) for run in runs if run)


def test_ordinary_lines_have_none() -> None:
    for line in ("Loading safetensors shards: 20%", "Using FlashAttention backend.", "Capturing CUDA graphs: 3/35"):
        assert not texts.has_keyword(line)
