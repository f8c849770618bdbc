"""A page on a journal without an engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from page_bench import PageBench, page_bench, page_config

from sidecar.page import event_stream


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PageBench]:
    """The page, while the configuration file's arguments serve; it refreshes more often than in production."""
    monkeypatch.setattr(event_stream, "_EVERY_S", 0.3)
    with page_bench(page_config(tmp_path)) as served:
        served.serve("the sidecar has started; it is up")
        yield served
