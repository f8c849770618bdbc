"""The wheel in bare environments: the plugin alone, and with the sidecar."""

import email
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
# The tested versions, so that pip has nothing to choose.
PINS = ROOT / "deploy" / "requirements" / "sloguard.txt"
# Inside vLLM's environment the plugin may bring no more than this.
PLUGIN_NEEDS = {"grpcio", "nvidia-ml-py", "protobuf", "psutil", "pydantic"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    # A copy: a build/ folder of an earlier layout would end up in the wheel.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("sidecar", "vllm_sloguard"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([sys.executable, "-m", *command], check=True, timeout=300)
    (built,) = folder.glob("vllm_sloguard-*.whl")
    return built


def installed(wheel: Path, folder: Path, extra: str) -> Path:
    """The folder of the programs of a fresh environment with ``wheel``."""
    venv.create(folder)
    programs = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", programs / "python"]
    command = [*pip, "install", "--quiet", "--no-compile", "--constraint", PINS, f"{wheel}{extra}"]
    subprocess.run(command, check=True, timeout=500)
    return programs


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, timeout=300, cwd="/")


def test_the_plugin_needs_little(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith("/METADATA"))
        needs = [
            Requirement(line) for line in email.message_from_bytes(file.read(metadata)).get_all("Requires-Dist", [])
        ]

    assert {need.name for need in needs if need.marker is None} == PLUGIN_NEEDS


def test_the_plugin_alone(wheel: Path, tmp_path: Path) -> None:
    programs = installed(wheel, tmp_path / "plugin", "")
    code = "import vllm_sloguard, vllm_sloguard.hooks.plugin as p; p.register(); print(vllm_sloguard.__version__)"

    plugin = run(programs / "python", "-c", code)
    assert plugin.returncode == 0, plugin.stderr
    assert plugin.stdout.strip() == wheel.name.split("-")[1]
    hooks = run(programs / "python", "-c", "import vllm_sloguard.hooks.telemetry_client, vllm_sloguard.guard.repair")
    assert hooks.returncode == 0, hooks.stderr
    # The command belongs to the sidecar.
    command = run(programs / "sloguard", "--help")
    assert command.returncode == 1
    assert command.stderr.splitlines() == [
        "sloguard: only the vLLM plugin is installed here; for this command: pip install 'vllm-sloguard[sidecar]'"
    ]


def test_the_sidecar_without_vllm(wheel: Path, tmp_path: Path) -> None:
    programs = installed(wheel, tmp_path / "sidecar", "[sidecar]")

    shown = run(programs / "sloguard", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "serve" in shown.stdout
    walk = "pkgutil.walk_packages(sidecar.__path__, 'sidecar.')"
    names = f"[m.name for m in {walk} if m.name != 'sidecar.search.gp']"  # that optimizer needs torch
    every = f"import importlib, pkgutil, sidecar; [importlib.import_module(name) for name in {names}]"
    imported = run(programs / "python", "-c", every)
    assert imported.returncode == 0, imported.stderr
    # What it shows and reads lies in the package.
    page = (
        "from importlib.resources import files; print(len(files('sidecar.report').joinpath('page.html').read_bytes()))"
    )
    assert int(run(programs / "python", "-c", page).stdout) > 1000
