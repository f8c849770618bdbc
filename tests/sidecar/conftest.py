"""A browser for the page and the report: one for both, as Playwright allows one per process."""

from chromium_tab import browser, tab

__all__ = ["browser", "tab"]
