"""docs/architecture.md is what the code is: its lists are fresh, and its walks name functions that exist."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAME = re.compile(r"`((?:sidecar|vllm_sloguard)(?:\.\w+)+)`")
STEP = re.compile(r"^\d+\. `((?:sidecar|vllm_sloguard)[\w.]+)`", re.MULTILINE)
# Each list of steps with the heading or line above it.
WALKS = [walk for walk in re.split(r"\n(?=## |In a trial:|After a promotion)", PAGE) if STEP.search(walk)]


@pytest.mark.parametrize("script", ["generate_architecture.py", "generate_commands.py"])
def test_generated_pages_are_fresh(script: str) -> None:
    command = [sys.executable, ROOT / "docs" / script, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_package_with_code_is_listed() -> None:
    packages = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/__init__.py")}
    ours = {name for name in packages if name.split("/")[0] in ("sidecar", "vllm_sloguard")}

    listed = re.findall(r"^### (\S+)/$", PAGE, re.MULTILINE)

    assert ours - {"vllm_sloguard/wire"} == set(listed)  # wire is generated from protos/


def exists(name: str) -> bool:
    """Whether it is a module, or a function or class in one. Modules that need vLLM are read, not imported."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        if path.with_suffix(".py").exists() or path.joinpath("__init__.py").exists():
            break
    else:
        return False
    rest = parts[count:]
    if not rest:
        return True
    if parts[1] == "hooks":
        text = path.with_suffix(".py").read_text(encoding="utf-8")
        return all(re.search(rf"^\s*(?:def|class) {word}\b", text, re.MULTILINE) for word in rest)
    found: object = importlib.import_module(".".join(parts[:count]))
    for word in rest:
        found = getattr(found, word, None)
    return found is not None


def test_every_name_on_the_page_exists() -> None:
    names = NAME.findall(PAGE)

    assert len(names) > 10
    assert [name for name in names if not exists(name)] == []
    assert not exists("sidecar.run.trial_runner.TrialRunner.fly")


@pytest.mark.parametrize("walk", WALKS, ids=[walk.splitlines()[0] for walk in WALKS])
def test_a_walk_visits_each_room_once(walk: str) -> None:
    rooms = [".".join(step.split(".")[:2]) for step in STEP.findall(walk)]

    assert len(rooms) >= 4
    assert len(set(rooms)) == len(rooms)


def test_the_page_has_its_three_walks() -> None:
    assert len(WALKS) == 3
