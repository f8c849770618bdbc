"""Writes the module lists of docs/architecture.md from the modules' docstrings; ``--check``: 1 where they are stale."""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- modules: begin -->", "<!-- modules: end -->"
# Lowest first: imports only look down, so up this list.
SIDECAR = (
    "search", "config", "engine", "observe", "measure", "record", "guard", "promote", "run", "service",
    "metrics", "export", "preflight", "adopt", "page", "report", "bench", "cli",
)  # fmt: skip
PLUGIN = ("", "agent", "crash", "guard", "guard/rules", "hooks", "starts")


def page() -> str:
    """The page with fresh lists."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{_lists()}\n{END}{after}"


def _lists() -> str:
    folders = [f"vllm_sloguard/{name}".rstrip("/") for name in PLUGIN] + ["sidecar"]
    folders += [f"sidecar/{name}" for name in SIDECAR]
    return "\n".join(_list(ROOT / folder) for folder in folders)


def _list(folder: Path) -> str:
    rows = [
        f"| `{path.stem}` | {_first_sentence(path)} |" for path in sorted(folder.glob("*.py")) if path.stem[0] != "_"
    ]
    name = folder.relative_to(ROOT)
    return "\n".join(
        [f"### {name}/", "", _docstring(folder / "__init__.py"), "", "| module | |", "| --- | --- |", *rows, ""]
    )


def _first_sentence(path: Path) -> str:
    return _docstring(path).replace("``", "`").replace("|", "\\|")


def _docstring(path: Path) -> str:
    """The first paragraph, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def main() -> None:
    """Writes the page, or checks it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE.name} is stale: python docs/generate_architecture.py")


if __name__ == "__main__":
    main()
