"""What all tests share."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs vLLM where there is none, and says so."""
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make setup"))


@pytest.fixture(scope="session")
def demo_config_file() -> Path:
    """The demo's YAML file: a tiny model on vLLM's CPU build."""
    return ROOT / "deploy" / "demo" / "sloguard.yaml"
