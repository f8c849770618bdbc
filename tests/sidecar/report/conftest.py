"""A browser for the report."""

from chromium_tab import browser, tab

__all__ = ["browser", "tab"]
