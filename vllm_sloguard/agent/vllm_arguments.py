"""The names of vLLM's arguments, read from its source: importing vLLM would delay the agent's start by seconds."""

import json
import subprocess

_TIMEOUT_S = 30.0
# Its argument classes have moved between versions, so every file that may have one is read.
_SCRIPT = """
import ast, importlib.util, json, pathlib
spec = importlib.util.find_spec("vllm")
names = set()
for root in map(pathlib.Path, spec.submodule_search_locations or () if spec else ()):
    for path in [root / "engine" / "arg_utils.py", *root.glob("entrypoints/**/cli_args.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Args"):
                names |= {a.target.id for a in node.body if isinstance(a, ast.AnnAssign)}
            elif isinstance(node, ast.Constant) and str(node.value).startswith("--"):
                names.add(str(node.value)[2:].replace("-", "_"))
print(json.dumps(sorted(names)))
"""


def arguments_of_vllm(python: str) -> frozenset[str]:
    """The arguments of the vLLM in ``python``'s environment; empty if they can't be read."""
    try:
        done = subprocess.run(
            [python, "-P", "-c", _SCRIPT], check=False, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
        found: object = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return frozenset()
    return frozenset(map(str, found)) if isinstance(found, list) else frozenset()  # pyright: ignore[reportUnknownArgumentType]
