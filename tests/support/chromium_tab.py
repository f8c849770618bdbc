"""Fixtures for pages in headless Chromium, and axe-core's verdict on what they show."""

import importlib.util
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A headless Chromium, for one file: while Playwright runs, its event loop is this thread's."""
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


def serious_violations(page: "Page") -> list[str]:
    """What axe-core calls serious or critical, each with the first element."""
    from axe_playwright_python.base import AXE_SCRIPT  # pyright: ignore[reportMissingTypeStubs]

    page.evaluate(AXE_SCRIPT)
    found: list[dict[str, Any]] = page.evaluate("axe.run().then(result => result.violations)")
    return [
        f"{v['id']}: {v['help']}: {v['nodes'][0]['html'][:200]} {v['nodes'][0]['failureSummary']}"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]
