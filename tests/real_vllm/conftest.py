"""What the tests on real vLLM share."""

import sys
from collections.abc import Iterator

import pytest

from sidecar.measure.load_client import LoadClient


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadClient]:
    """One load client for all loads: it imports vLLM once, and must serve the next load after any end of one."""
    started = LoadClient(sys.executable, tmp_path_factory.mktemp("load") / "client.log", {"HF_HUB_OFFLINE": "1"})
    yield started
    started.close()
