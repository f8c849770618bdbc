"""What all tests share."""

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
# The fake engine's python3 is the one with the packages, also where its environment is not active.
os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
# In the background of a shell it is ignored, and what is started from here would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The same inputs in every run, whatever else runs on the machine: neither its speed nor chance decides.
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

# Files that take half a minute or more: begun first, so that none is left at the end.
SLOW_FILES = (
    "test_faults.py",
    "test_doctor.py",
    "test_kv_specs_on_vllm.py",
    "test_operations_on_a_fake_engine.py",
    "test_service_on_a_fake_engine.py",
    "test_agent_on_a_fake_engine.py",
    "test_outside_faults.py",
    "test_model_builds_on_vllm.py",
    "test_bench_landscapes_shipped.py",
    "test_packaging.py",
    "test_page_http.py",
    "test_probation.py",
    "test_commands.py",
)


@pytest.fixture(autouse=True)
def no_agent_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends the agent of a sidecar that the test has killed: it would restore the service."""
    folder: Path | None = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if folder is not None:
        from local_agents import end_local_agents

        end_local_agents(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the slow files, and skips the engine tests without vLLM."""
    slow = {name: place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: slow.get(item.path.name, len(slow)))
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make setup"))


@pytest.fixture(scope="session")
def demo_config_file() -> Path:
    """The demo's YAML file: a tiny model on vLLM's CPU build."""
    return ROOT / "deploy" / "demo" / "sloguard.yaml"
