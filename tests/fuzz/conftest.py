"""Prints how many inputs of each kind were tried, by all processes of pytest-xdist together."""

from typing import Any

import pytest
from malformed import COUNTS, KINDS


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells what it has counted."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["malformed"] = [[*of, count] for of, count in COUNTS.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds what a worker has told."""
    for kind, became, count in getattr(node, "workeroutput", {}).get("malformed", ()):
        COUNTS[kind, became] += count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a kind, after the tests."""
    if not COUNTS:
        return
    terminalreporter.section("malformed inputs")
    for kind in KINDS:
        tried = COUNTS[kind, "refused"] + COUNTS[kind, "taken"]
        terminalreporter.write_line(f"{kind}: {tried:,} tried, {COUNTS[kind, 'refused']:,} refused in one line")
    terminalreporter.write_line(f"{COUNTS.total():,} in all")
