"""Asks the vLLM of a Python environment to build models: one helper process, kept warm."""

import atexit
import json
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

# Importing vLLM takes 7 s on two idle cores, and building the largest models 1 s.
ANSWER_TIMEOUT_S = 90.0
_MEMORY_BYTES = 8 * 2**30
# An idle helper exits: the serving engine needs the memory.
_IDLE_S = 120.0


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
