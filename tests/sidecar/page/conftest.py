"""A page on a journal without an engine, and a browser."""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from page_bench import PageBench, page_bench, page_config

from sidecar.page import event_stream

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PageBench]:
    """The page, while the configuration file's arguments serve; it refreshes more often than in production."""
    monkeypatch.setattr(event_stream, "_EVERY_S", 0.3)
    with page_bench(page_config(tmp_path)) as served:
        served.serve("the sidecar has started; it is up")
        yield served


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """A headless Chromium."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: make setup")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"], timeout=300_000
        )
        yield launched
        launched.close()


@pytest.fixture
def tab(browser: "Browser") -> "Iterator[Page]":
    """A browser tab; console errors other than a lost connection fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB")
    page = context.new_page()
    page.set_default_timeout(90_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    allowed = ("net::ERR_", "401", "409")
    assert [c for c in complaints if not any(text in c for text in allowed)] == []
