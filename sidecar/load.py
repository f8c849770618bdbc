"""The load of a trial: vLLM's own benchmark client, in a process of vLLM's environment that is kept alive."""

import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sidecar.config import Workload
from sidecar.engine.engine import Cancelled

_START_TIMEOUT_S = 180.0
_SPARE_S = 60.0
_POLL_S = 0.2
_LONGEST_S = 1e9


class LoadError(RuntimeError):
    """The client could not measure; the text says why."""


class LoadTimeoutError(LoadError):
    """The client did not come back: the engine takes requests and does not answer."""


@dataclass(frozen=True)
class Request:
    """One request as the client saw it: seconds; None for what it did not see; ``error`` is empty when it succeeded.

    ``start_s`` is on a clock of the client's own, None where it does not say.
    """

    ttft_s: float | None
    e2e_s: float | None
    itls_s: tuple[float, ...]
    error: str = ""
    start_s: float | None = None


@dataclass(frozen=True)
class LoadResult:
    """Every request of one load, failed ones included, and how long it took from the first to the last."""

    requests: tuple[Request, ...]
    duration_s: float


class LoadClient:
    """Sends loads, one at a time. Started at its first use, and again when it has died."""

    def __init__(self, python: str, log: Path, env: Mapping[str, str]) -> None:
        self._python = python
        self._log = log
        self._env = env
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._awaiting_ready = False

    def start(self) -> None:
        """Starts the client, which imports for some seconds, and does not wait for it."""
        if self._process is not None and self._process.poll() is None:
            return
        self._answers = queue.Queue()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._python, "-m", "vllm_sloguard.loadgen"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                errors="replace",
                start_new_session=True,
                env=_environment(self._env),
            )
        threading.Thread(target=_drain, args=(self._process, self._answers), daemon=True).start()
        self._awaiting_ready = True

    def run(
        self, workload: Workload, base_url: str, model: str, tokenizer: str, cancelled: Callable[[], bool]
    ) -> LoadResult:
        """Sends ``workload`` to the engine at ``base_url``. Raises LoadError, LoadTimeoutError, Cancelled."""
        self.start()
        self._await_imports(cancelled)
        request = {
            "argv": _argv(workload, base_url, model, tokenizer),
            "request_timeout_s": workload.request_timeout_s,
        }
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise LoadError(f"the benchmark client has died: {error}; see {self._log}") from None
        # Each request has its own deadline: the warm-up's, then the last one's after the time that sending takes.
        longest = workload.requests / workload.rate * 2 + workload.request_timeout_s * 2 + _SPARE_S
        answer = self._answer(longest, cancelled)
        if "error" in answer:
            raise LoadError(f"the benchmark client failed: {str(answer['error'])[:1000]}")
        try:
            return _checked(_result(answer["result"]))
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            said = f"{type(error).__name__}: {error}"[:200]
            raise LoadError(f"the benchmark client's result can't be read: {said}") from None

    def _await_imports(self, cancelled: Callable[[], bool]) -> None:
        if self._awaiting_ready:
            try:
                self._answer(_START_TIMEOUT_S, cancelled)
            except LoadTimeoutError as error:
                # That says nothing about the engine.
                raise LoadError(str(error)) from None
            self._awaiting_ready = False

    def close(self) -> None:
        """Ends the client."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answer(self, timeout_s: float, cancelled: Callable[[], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while (line := self._poll()) == "":
            if cancelled():
                self.close()
                raise Cancelled
            if time.monotonic() > deadline:
                self.close()
                raise LoadTimeoutError(f"the benchmark client did not answer within {timeout_s:.0f} s")
        if line is None:
            self.close()
            raise LoadError(f"the benchmark client has died; see {self._log}")
        try:
            return _object(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            # What comes after it would be taken for the answer to the next load.
            self.close()
            raise LoadError(
                f"the benchmark client's answer can't be read: {str(error)[:200]}; see {self._log}"
            ) from None

    def _poll(self) -> str | None:
        """The next line; empty when there is none yet, None when there will be none."""
        try:
            return self._answers.get(timeout=_POLL_S)
        except queue.Empty:
            return ""


def _object(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise TypeError(f"an object was expected, not {type(answer).__name__}")
    return cast("dict[str, Any]", answer)


def _drain(process: subprocess.Popen[str], answers: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put(None)


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    # The client is no engine: the plugin stays silent in it. Its prompts are the same in every run.
    own = {"VLLM_PLUGINS": "", "PYTHONHASHSEED": "0"}
    engines = {**os.environ, **env}
    key = engines.get("VLLM_API_KEY")
    return {**engines, **own, **({"OPENAI_API_KEY": key} if key else {})}


def _argv(workload: Workload, base_url: str, model: str, tokenizer: str) -> list[str]:
    flags: dict[str, object] = {
        "backend": "openai",
        "base-url": base_url,
        "endpoint": "/v1/completions",
        "model": model,
        "tokenizer": tokenizer,
        "dataset-name": "random",
        "random-input-len": workload.input_tokens,
        "random-output-len": workload.output_tokens,
        "random-range-ratio": workload.spread,
        "num-prompts": workload.requests,
        "num-warmups": workload.warmup_requests,
        "request-rate": workload.rate,
        "seed": workload.seed,
        "ready-check-timeout-sec": 0,
    }
    argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return [*argv, "--ignore-eos", "--save-detailed", "--disable-tqdm"]


def _result(result: dict[str, Any]) -> LoadResult:
    """Reads the client's result; a failed request carries 0 for what was not seen."""
    latencies: list[float] = result.get("latencies") or _latencies(result)
    starts: list[float | None] = result.get("start_times") or [None] * len(latencies)
    requests = tuple(
        Request(
            ttft_s=None if error else ttft,
            e2e_s=None if error else latency,
            itls_s=() if error else tuple(itls),
            error=error,
            start_s=start,
        )
        for ttft, latency, itls, error, start in zip(
            result["ttfts"], latencies, result["itls"], result["errors"], starts, strict=True
        )
    )
    return LoadResult(requests, float(result["duration"]))


def _checked(load: LoadResult) -> LoadResult:
    """``load``, if all that it measured are finite numbers. Raises TypeError."""
    for request in load.requests:
        for value in (request.ttft_s, request.e2e_s, request.start_s, *request.itls_s, load.duration_s):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and abs(value) < _LONGEST_S):
                raise TypeError(f"seconds were expected, not {str(value)[:40]!r}")
        if not isinstance(request.error, str):  # pyright: ignore[reportUnnecessaryIsInstance] - it comes from outside
            raise TypeError(f"a text was expected, not {str(request.error)[:40]!r}")
    return load


def _latencies(result: dict[str, Any]) -> list[float]:
    # Older clients leave them out: the first token and the gaps after it add up to the same.
    return [ttft + sum(itls) for ttft, itls in zip(result["ttfts"], result["itls"], strict=True)]
