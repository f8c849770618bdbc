"""The modules that vLLM's processes import, recorded in running engines for the fork server to import in advance.

One text file per version of vLLM, one module per line; ``!name`` must not be imported in the fork server. Append-only.
"""

import os
import sys
from pathlib import Path

# Created at run time, or unsafe to fork.
_NEVER = ("__main__", "__mp_main__", "transformers_modules", "grpc", "vllm_sloguard")


def list_path(folder: Path, vllm_version: str) -> Path:
    """The list's file for ``vllm_version``."""
    return folder / f"imports-{vllm_version}.txt"


def save_imports(path: Path) -> None:
    """Appends imports of this process that are not in the file yet. Raises OSError."""
    known = _lines(path)
    new = [name for name, module in list(sys.modules.items()) if name not in known and _wanted(name, module)]
    if new:
        _append(path, new)


def read_imports(path: Path) -> list[str]:
    """The modules to import, in the order of their first appearance."""
    known = _lines(path)
    return [name for name in known if not name.startswith(("!", *_NEVER)) and f"!{name}" not in known]


def exclude(path: Path, name: str) -> None:
    """Excludes ``name`` from now on. Raises OSError."""
    _append(path, [f"!{name}"])


def _wanted(name: str, module: object) -> bool:
    """Whether the module came from a file, so that its name suffices to import it, and is safe to import early."""
    spec = getattr(module, "__spec__", None)
    return getattr(spec, "has_location", False) and not name.startswith(_NEVER)


def _lines(path: Path) -> dict[str, None]:
    try:
        return dict.fromkeys(path.read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return {}


def _append(path: Path, names: list[str]) -> None:
    # One write, so that processes that end at the same time do not mix their lines.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, "".join(f"{name}\n" for name in names).encode())
    finally:
        os.close(descriptor)
