"""What all tests share."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The fake engine's python3 is the one with the packages, also where its environment is not active.
os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the engine tests of a file, which share what they start, on one worker; skips them without vLLM."""
    for item in items:
        if item.get_closest_marker("engine") and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make setup"))


@pytest.fixture(scope="session")
def demo_config_file() -> Path:
    """The demo's YAML file: a tiny model on vLLM's CPU build."""
    return ROOT / "deploy" / "demo" / "sloguard.yaml"
