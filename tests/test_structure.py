"""The shape of the code: what may import what, and how large a module may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The data flows down this list, and a module imports only from lines above its own.
LAYERS = (
    ("search.contract", "search.published", "search.values"),
    ("search.space",),
    ("search.failures", "search.encoding"),
    ("search.admission", "search.candidates", "search.crash_risk", "search.gaussian_process", "search.physics"),
    ("search.surrogate",),
    ("search.tba", "search.tpe", "search.uniform"),
    ("search.gp", "search.tba_tpe"),
    ("search.sloguard",),
    ("search.registry",),
    ("config_window", "knob_ranges"),
    ("capacity", "comparison", "config", "environment", "files", "lock", "rows", "schema", "shown", "states"),
    ("engine.command", "engine.http", "engine.process_group", "observed", "probation", "secret_files"),
    ("engine.fork_server",),
    ("engine.engine",),
    ("load",),
    ("judge",),
    ("so_far", "trial"),
    ("saturation", "sequential"),
    ("early_stop",),
    ("journal", "live", "promotion", "provenance", "seconds", "telemetry"),
    ("learning", "operations", "promoted", "remote", "traffic"),
    ("doctor", "hooks", "metrics_engine", "metrics_window", "opening"),
    ("metrics_trials",),
    ("metrics",),
    ("ceilings", "engines", "metrics_table"),
    ("trial_engine",),
    ("control", "guard", "guard_commands", "runner"),
    ("own_engines", "progress", "signals", "tuner"),
    ("forecast", "recorded", "serving", "terminal"),
    ("export.study", "export.tables", "operator_commands", "plan", "watch", "window"),
    ("export.bench", "report.words"),
    ("report.crashes", "report.handover", "report.importance", "report.repairs", "report.verdict"),
    ("report.story",),
    ("report.drawing",),
    ("report.knob_figures",),
    ("report.figures",),
    ("report.page",),
    ("report_commands",),
    ("page.figures", "page.gate", "page.orders", "page.token"),
    ("page.beat", "page.story"),
    ("page.feed",),
    ("page.app", "page.connections"),
    ("page.server",),
    ("assembly", "doctor_facts", "plan_command", "service"),
    ("doctor_command",),
    ("bench.landscape", "bench.restart", "bench.windows", "study"),
    ("bench.promotion_command", "bench.restart_command", "bench.simulate"),
    ("bench.parallel", "bench.summary"),
    ("bench.report",),
    ("bench.commands", "study_commands"),
    ("cli",),
    ("__main__",),
)
LAYER = {f"sidecar.{name}": number for number, names in enumerate(LAYERS) for name in names}
PURE = (
    "activations",
    "config_fields",
    "crash",
    "defaults",
    "gpus",
    "imported",
    "knobs",
    "kv_cache",
    "live",
    "machine",
    "memory",
    "model_shape",
    "quantization",
    "repair",
    "rules",
    "settings",
    "warmup",
    "weights",
    "windows",
)
INSIDE_VLLM = {
    f"vllm_sloguard.{name}"
    for name in ("engine_args", "live_link", "live_scheduler", "loadgen", "plugin", "stat_logger")
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
PACKAGES = ("sidecar", *(f"sidecar.{name}" for name in ("bench", "engine", "export", "page", "report", "search")))
MODULES = [name for name in SIDECAR if name not in PACKAGES]


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


def test_every_module_has_its_layer() -> None:
    assert set(MODULES) == set(LAYER)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    upward = [other for other in imports(SIDECAR[name]) & set(LAYER) if LAYER[other] >= LAYER[name]]

    assert not upward, f"{name} must not import {', '.join(upward)}"


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

    assert loaded_by([f"vllm_sloguard.{name}" for name in PURE], heavy) == set()


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
