"""A browser for the page and the report: shared, as Playwright allows one at a time in a process."""

from chromium_tab import browser, tab

__all__ = ["browser", "tab"]
