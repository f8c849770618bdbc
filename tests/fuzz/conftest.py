"""Prints how many inputs of each kind were tried."""

import pytest

from .malformed import COUNTS, KINDS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a kind, after the tests."""
    if not COUNTS:
        return
    terminalreporter.section("malformed inputs")
    for kind in KINDS:
        tried = COUNTS[kind, "refused"] + COUNTS[kind, "taken"]
        terminalreporter.write_line(f"{kind}: {tried:,} tried, {COUNTS[kind, 'refused']:,} refused in one line")
    terminalreporter.write_line(f"{COUNTS.total():,} in all")
