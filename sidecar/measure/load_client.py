"""The load of a trial: vLLM's own benchmark client, in a process of vLLM's environment that is kept alive."""

import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from sidecar.config.schema import Dataset, Workload
from sidecar.engine.engine import Cancelled
from sidecar.measure.requests import (
    Ending,
    InFlight,
    LoadProgress,
    LoadResult,
    RequestResult,
    StopRule,
    WarmUp,
    to_the_end,
)
from vllm_sloguard.starts import warmup

_START_TIMEOUT_S = 180.0
_SPARE_S = 60.0
_POLL_S = 0.2

_T = TypeVar("_T")


class LoadError(RuntimeError):
    """The client could not measure; the text says why."""


class LoadTimeoutError(LoadError):
    """The client did not come back: the engine takes requests and does not answer."""


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
                [self._python, "-m", "vllm_sloguard.starts.load_generator"],
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
        self,
        workload: Workload,
        base_url: str,
        model: str,
        tokenizer: str,
        cancelled: Callable[[], bool],
        *,
        watch: StopRule = to_the_end,
    ) -> LoadResult:
        """Sends ``workload`` to the engine at ``base_url``; ``watch`` may end it early.

        Raises LoadError, LoadTimeoutError, Cancelled.
        """
        self.start()
        self.await_ready(cancelled)
        self._send(
            {
                "argv": benchmark_argv(workload, base_url, model, tokenizer),
                "request_timeout_s": workload.request_timeout_s,
                "warmup_requests": workload.warmup_requests,
            }
        )
        # Each request has its own deadline: the last warm-up's, then the last one's after the time that sending takes.
        sending_s = workload.most_requests / workload.rate * 2
        longest_s = warmup.LONGEST_WARMUP_S + sending_s + workload.request_timeout_s * 2 + _SPARE_S
        answer, ending = self._watched(longest_s, cancelled, watch)
        if "error" in answer:
            raise LoadError(f"the benchmark client failed: {str(answer['error'])[:1000]}")
        result = self._understood(lambda: _result(answer["result"]))
        # It may have ended by itself before it could be ended.
        return replace(result, ending=ending) if len(result.requests) < result.planned else result

    def _watched(
        self, longest_s: float, cancelled: Callable[[], bool], watch: StopRule
    ) -> tuple[dict[str, Any], Ending | None]:
        """The load's answer, and how ``watch`` has ended it."""
        deadline = time.monotonic() + longest_s
        finished: tuple[RequestResult, ...] = ()
        ending: Ending | None = None
        while "progress" in (answer := self._answer(max(deadline - time.monotonic(), _POLL_S), cancelled)):
            progress = self._understood(lambda: _progress(answer["progress"], finished))  # noqa: B023 - called at once
            finished = progress.finished
            if ending is None and progress.planned:
                ending = watch(progress)
                if ending is not None:
                    self._send({"end": str(ending.how)})
        return answer, ending

    def _send(self, line: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise LoadError(f"the benchmark client has died: {error}; see {self._log}") from None

    def await_ready(self, cancelled: Callable[[], bool]) -> None:
        """Waits until a client that was started has its imports. Raises LoadError, Cancelled."""
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
        return self._understood(lambda: _object(json.loads(line)))

    def _understood(self, read: Callable[[], _T]) -> _T:
        """What ``read`` returns; a client that is not understood is ended, as what it says next may answer this."""
        try:
            return read()
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            self.close()
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            raise LoadError(f"the benchmark client's answer can't be read: {said}; see {self._log}") from None

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


def benchmark_argv(workload: Workload, base_url: str, model: str, tokenizer: str) -> list[str]:
    flags: dict[str, object] = {
        "backend": "openai",
        "base-url": base_url,
        "endpoint": "/v1/completions",
        "model": model,
        "tokenizer": tokenizer,
        "dataset-name": workload.dataset_name,
        **_dataset(workload),
        "num-prompts": workload.most_requests,
        "request-rate": workload.rate,
        "seed": workload.seed,
        "ready-check-timeout-sec": 0,
    }
    argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    if workload.dataset_path is not None:
        argv.append("--skip-chat-template")  # the endpoint takes prompts as they are
    return [*argv, "--ignore-eos", "--save-detailed", "--disable-tqdm"]


def _dataset(workload: Workload) -> dict[str, object]:
    """The options of vLLM's reader."""
    if workload.dataset_path is None:
        return {
            "random-input-len": workload.input_tokens,
            "random-output-len": workload.output_tokens,
            "random-range-ratio": workload.spread,
        }
    lengths = {"custom-output-len": -1} if workload.dataset_name is Dataset.CUSTOM else {}  # each line's own
    return {"dataset-path": workload.dataset_path, **lengths}


def _progress(told: Mapping[str, Any], before: tuple[RequestResult, ...]) -> LoadProgress:
    finished = tuple(_request(row) for row in told["finished"])
    flying = tuple(InFlight(start, ttft) for start, ttft in told["in_flight"])
    return LoadProgress(told["now"], told["planned"], before + finished, flying)


def _request(row: Mapping[str, Any]) -> RequestResult:
    return RequestResult(row["ttft"], row["e2e"], tuple(row["itls"]), row["error"], row["start"])


def _result(result: dict[str, Any]) -> LoadResult:
    """Reads the client's columns; of a failed request nothing but its error counts."""
    errors: list[str] = result["errors"]
    starts: list[float | None] = result.get("start_times") or [None] * len(errors)
    requests = tuple(
        RequestResult(
            ttft_s=None if error else ttft,
            e2e_s=None if error else latency,
            itls_s=() if error else tuple(itls),
            error=error,
            start_s=start,
        )
        for ttft, latency, itls, error, start in zip(
            result["ttfts"], result["latencies"], result["itls"], errors, starts, strict=True
        )
    )
    return LoadResult(
        requests,
        float(result["duration"]),
        int(result.get("planned", len(requests))),
        len(result.get("in_flight", ())),
        WarmUp(**result.get("warm_up", {})),
    )
