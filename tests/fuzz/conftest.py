"""Prints how many inputs of each kind were tried, over all pytest-xdist workers."""

from typing import Any

import pytest
from malformed import COUNTS, KINDS


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker reports its counts."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["malformed"] = [[*of, count] for of, count in COUNTS.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds the counts of a worker."""
    for kind, became, count in getattr(node, "workeroutput", {}).get("malformed", ()):
        COUNTS[kind, became] += count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints one line per kind after the tests."""
    if not COUNTS:
        return
    terminalreporter.section("malformed inputs")
    for kind in KINDS:
        tried = COUNTS[kind, "refused"] + COUNTS[kind, "taken"]
        terminalreporter.write_line(f"{kind}: {tried:,} tried, {COUNTS[kind, 'refused']:,} refused in one line")
    terminalreporter.write_line(f"{COUNTS.total():,} in all")
