"""The shape of the code: what may import what, and how large a module may be."""

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Data flows up this list, and imports only look down it: a room imports from rooms above it here, never below.
ROOMS = (
    "format",
    "http_server",
    "search",
    "config",
    "engine",
    "observe",
    "measure",
    "record",
    "guard",
    "promote",
    "run",
    "service",
)
# What operators see: they read, and give orders; no room imports them. Among themselves, in this order.
FACES = ("metrics", "export", "preflight", "adopt", "page", "report", "bench", "cli", "__main__")
ORDER = {room: number for number, room in enumerate((*ROOMS, *FACES))}
MAX_AT_ROOT = 5
PURE = (
    "crash",
    "guard",
    "hooks.settings",
    "knobs",
    "latency",
    "live_knobs",
    "starts.import_list",
    "starts.load_protocol",
    "starts.warmup",
)
# The sidecar must not import what needs vLLM.
INSIDE_VLLM = {
    *(
        f"vllm_sloguard.hooks.{name}"
        for name in ("engine_args", "live_client", "live_scheduler", "plugin", "stat_logger")
    ),
    "vllm_sloguard.starts.completion_client",
    "vllm_sloguard.starts.load_generator",
}


def sources(package: str) -> dict[str, Path]:
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / package).rglob("*.py"))
        if "wire" not in path.parts
    }
    assert len(found) > 10
    return found


SIDECAR, PLUGIN = sources("sidecar"), sources("vllm_sloguard")
ALL = {**SIDECAR, **PLUGIN}
MODULES = [name for name, path in SIDECAR.items() if path.name != "__init__.py"]


def room(module: str) -> str:
    """The package below ``sidecar`` that ``module`` lies in, or the module's own name at the root."""
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """Every module that ``path`` imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            found |= {f"{module}.{a.name}" if f"{module}.{a.name}" in ALL else module for a in node.names}
    return found


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_every_module_is_in_a_room_and_the_root_is_nearly_empty() -> None:
    assert {room(name) for name in MODULES} == set(ORDER)
    assert len(list((ROOT / "sidecar").glob("*.py"))) <= MAX_AT_ROOT


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_look_down(name: str) -> None:
    upward = [other for other in imports(SIDECAR[name]) & set(MODULES) if ORDER[room(other)] > ORDER[room(name)]]

    assert not upward, f"{name} must not import {', '.join(upward)}"


def test_no_face_is_imported_from_below() -> None:
    found = {
        (name, other)
        for name in MODULES
        if room(name) not in FACES
        for other in imports(SIDECAR[name]) & set(MODULES)
        if room(other) in FACES
    }

    assert found == set()


def test_modules_do_not_import_in_a_circle() -> None:
    graph = {name: imports(SIDECAR[name]) & set(MODULES) for name in MODULES}

    assert tuple(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("name", list(SIDECAR))
def test_sidecar_imports_nothing_of_vllm(name: str) -> None:
    found = imports(SIDECAR[name])

    assert not packages(found) & {"vllm", "torch", "transformers"}
    assert not found & INSIDE_VLLM


@pytest.mark.parametrize("name", list(PLUGIN))
def test_plugin_imports_nothing_of_the_sidecar(name: str) -> None:
    assert "sidecar" not in packages(imports(PLUGIN[name]))


def loaded_by(modules: list[str], unwanted: tuple[str, ...]) -> set[str]:
    """Which of the ``unwanted`` packages are loaded in a fresh process after ``modules``."""
    code = f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\nprint(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    names = set(ended.stdout.split())
    assert set(modules) <= names
    return names & set(unwanted)


def test_the_running_sidecar_loads_nothing_of_vllm() -> None:
    assert loaded_by([*MODULES], ("vllm", "torch", "transformers")) == set()


def test_no_command_waits_for_what_only_reports_and_exports_need() -> None:
    assert loaded_by(["sidecar.cli.main"], ("plotly", "jinja2", "sqlalchemy")) == set()


def test_pure_modules_load_nothing_heavy() -> None:
    heavy = ("grpc", "google.protobuf", "vllm", "torch", "numpy", "psutil", "pydantic", "sidecar")

    pure = [m for m in PLUGIN for name in PURE if f"{m}.".startswith(f"vllm_sloguard.{name}.")]
    pure.remove("vllm_sloguard.guard.start_history")  # its file is read with pydantic

    assert len(pure) > len(PURE)
    assert loaded_by(pure, heavy) == set()


def test_grpc_is_not_loaded_with_the_plugin() -> None:
    # gRPC must not be alive in a process that forks, and vLLM forks after it has loaded the plugin.
    assert loaded_by(["vllm_sloguard.hooks.plugin"], ("grpc", "vllm", "torch")) == set()


@pytest.mark.parametrize("name", list(ALL))
def test_no_module_is_long(name: str) -> None:
    assert len(ALL[name].read_text(encoding="utf-8").splitlines()) <= 400


def swallowed(path: Path) -> list[int]:
    """The lines that catch everything, do not raise it again, and name no boundary."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found: list[int] = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = "" if node.type is None else ast.unparse(node.type)
        everything = not caught or "Exception" in caught.strip("()").split(", ") or "BaseException" in caught
        last = node.body[-1]
        raised_again = isinstance(last, ast.Raise) and last.exc is None
        line = lines[node.lineno - 1]
        if everything and not raised_again and not ("noqa: BLE001 - " in line and "boundary" in line):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("name", list(ALL))
def test_everything_is_caught_at_boundaries_only(name: str) -> None:
    assert swallowed(ALL[name]) == []


def test_a_swallowed_exception_would_be_found(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "try: pass\nexcept Exception: pass\n"
        "try: pass\nexcept (OSError, Exception) as e: pass\n"
        "try: pass\nexcept: pass\n"
        "try: pass\nexcept Exception: raise\n"
        "try: pass\nexcept Exception: pass  # noqa: BLE001 - the boundary to vLLM\n"
    )

    assert swallowed(path) == [2, 4, 6]


# Public names that are defined more than once, each with the reason why that is one meaning.
SAME_MEANING = {
    "main": "the entry point of a program",
    "register": "adds something to a registry: commands to the app, the plugin's hooks to vLLM",
    "logger": "vLLM's logger, in each module that writes to its log",
}


def public_names(path: Path) -> set[str]:
    """Every name without a leading underscore that the module defines at its top level."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def test_a_public_name_has_one_meaning() -> None:
    defined: defaultdict[str, list[str]] = defaultdict(list)
    for module, path in ALL.items():
        for name in public_names(path):
            defined[name].append(module)
    several = {name: modules for name, modules in defined.items() if len(modules) > 1}

    assert {name: modules for name, modules in several.items() if name not in SAME_MEANING} == {}
    assert set(SAME_MEANING) <= set(several), "an exception that is no longer needed"
