"""The code never evaluates text, unpickles, loads YAML objects, or uses a shell."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for package in ("sidecar", "vllm_sloguard") for path in (ROOT / package).rglob("*.py"))
MODULES = {"cloudpickle", "code", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve", "telnetlib", "xmlrpc"}
CALLS = {"__import__", "compile", "eval", "exec"}
METHODS = {
    "yaml": {"dump", "full_load", "load", "load_all", "unsafe_load"},
    "os": {"popen", "system"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "tempfile": {"mktemp"},
    "np": {"load"},
    "numpy": {"load"},
    "torch": {"load"},
}


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in named if name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            yield from _fault_of_call(node)


def _fault_of_call(node: ast.Call) -> Iterator[str]:
    match node.func:
        case ast.Name(id=name) if name in CALLS:
            yield name
        case ast.Attribute(value=ast.Name(id=module), attr=name) if name in METHODS.get(module, ()):
            yield f"{module}.{name}"
        case _:
            pass
    for keyword in node.keywords:
        plain = isinstance(keyword.value, ast.Constant) and not keyword.value.value
        if keyword.arg in ("shell", "allow_pickle") and not plain:
            yield f"{keyword.arg}="


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_evaluated_unpickled_or_given_to_a_shell(path: Path) -> None:
    assert list(faults(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_each_fault_would_be_found() -> None:
    bad = """
import pickle
from marshal import loads
eval("1"); exec("1"); compile("1", "", "eval"); __import__("os")
yaml.load(f); yaml.full_load(f); os.system("a"); os.popen("a"); np.load(f, allow_pickle=True)
subprocess.run("a", shell=True); subprocess.run("a", shell=flag); subprocess.getoutput("a")
"""
    good = "yaml.safe_load(f)\nsubprocess.run(['a'], shell=False)\nre.compile('a')\nast.literal_eval('1')\n"
    found = "pickle marshal eval exec compile __import__ yaml.load yaml.full_load os.system os.popen np.load"
    found += " allow_pickle= shell= shell= subprocess.getoutput"
    assert sorted(faults(ast.parse(bad))) == sorted(found.split())
    assert list(faults(ast.parse(good))) == []
