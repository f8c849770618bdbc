"""Sends a trial's load, made by vLLM's own benchmark, from a long-lived process in vLLM's environment."""

import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field, TypeAdapter, ValidationError

from sidecar.config.workload_section import Dataset, Workload
from sidecar.engine.engine import Cancelled
from sidecar.measure.requests import Ending, LoadProgress, LoadResult, RequestResult, StopRule, to_the_end
from vllm_sloguard.agent.load_process import send_command, start_generator
from vllm_sloguard.starts import warmup
from vllm_sloguard.starts.load_protocol import (
    EndLoad,
    GeneratorCommand,
    GeneratorMessage,
    LoadDelta,
    LoadFailure,
    LoadReport,
    Ready,
    RunLoad,
)

_START_TIMEOUT_S = 180.0
_SPARE_S = 60.0
_POLL_S = 0.2
_MESSAGE: TypeAdapter[GeneratorMessage] = TypeAdapter(Annotated[GeneratorMessage, Field(discriminator="type")])


class LoadError(RuntimeError):
    """The client could not measure; the text is the reason."""


class LoadTimeoutError(LoadError):
    """The client timed out: the engine accepts requests and does not complete them."""


class GeneratorProcess(Protocol):
    """The process that sends the loads. ``log`` names where its own output goes."""

    log: str

    def start(self) -> bool:
        """Starts it without waiting, unless it runs; returns whether it was started. Raises LoadError."""
        ...

    def send(self, order: GeneratorCommand) -> None:
        """Raises LoadError."""
        ...

    def poll(self) -> str | None:
        """The next line; empty if there is none yet, None at the end of the stream."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class LocalGenerator:
    """The process on this machine."""

    def __init__(self, python: str, log: Path, env: Mapping[str, str]) -> None:
        self._python = python
        self._log = log
        self._env = env
        self.log = str(log)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()

    def start(self) -> bool:
        """Starts it without waiting, unless it runs; returns whether it was started. Raises OSError."""
        if self._process is not None and self._process.poll() is None:
            return False
        self._answers = queue.Queue()
        self._process = start_generator(self._python, self._log, {**os.environ, **self._env})
        threading.Thread(target=_drain, args=(self._process, self._answers), daemon=True).start()
        return True

    def send(self, order: GeneratorCommand) -> None:
        """Raises LoadError."""
        assert self._process is not None
        try:
            send_command(self._process, order)
        except OSError as error:
            raise LoadError(f"the benchmark client has died: {error}; see {self._log}") from None

    def poll(self) -> str | None:
        """The next line; empty if there is none yet, None at the end of the stream."""
        try:
            return self._answers.get(timeout=_POLL_S)
        except queue.Empty:
            return ""

    def close(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class LoadClient:
    """Sends loads one at a time. The process is started on first use, and again after it has died."""

    def __init__(
        self, python: str, log: Path, env: Mapping[str, str], generator: GeneratorProcess | None = None
    ) -> None:
        self._generator = generator if generator is not None else LocalGenerator(python, log, env)
        self._awaiting_ready = False

    def start(self) -> None:
        """Starts the client without waiting for it; its imports take several seconds."""
        if self._generator.start():
            self._awaiting_ready = True

    def run(
        self,
        workload: Workload,
        base_url: str,
        model: str,
        tokenizer: str,
        cancelled: Callable[[], bool],
        *,
        stop_rule: StopRule = to_the_end,
    ) -> LoadResult:
        """Sends ``workload`` to the engine at ``base_url``; ``stop_rule`` may end the load early.

        Raises LoadError, LoadTimeoutError, Cancelled.
        """
        self.start()
        self.await_ready(cancelled)
        argv = benchmark_argv(workload, base_url, model, tokenizer)
        self._generator.send(RunLoad(tuple(argv), workload.request_timeout_s, workload.warmup_requests))
        # Each request has its own deadline: the last warm-up's, and the last one's after the sending time.
        sending_s = workload.most_requests / workload.rate * 2
        longest_s = warmup.LONGEST_WARMUP_S + sending_s + workload.request_timeout_s * 2 + _SPARE_S
        report, ending = self._until_reported(longest_s, cancelled, stop_rule)
        # It may have finished before the stop took effect.
        stopped = ending if len(report.requests) < report.planned else None
        return LoadResult(report.requests, report.duration_s, report.planned, report.cancelled, report.warm_up, stopped)

    def _until_reported(
        self, longest_s: float, cancelled: Callable[[], bool], stop_rule: StopRule
    ) -> tuple[LoadReport, Ending | None]:
        """The load's report, and the ending that ``stop_rule`` chose."""
        deadline = time.monotonic() + longest_s
        finished: tuple[RequestResult, ...] = ()
        ending: Ending | None = None
        while True:
            message = self._receive(max(deadline - time.monotonic(), _POLL_S), cancelled)
            match message:
                case LoadReport():
                    return message, ending
                case LoadFailure(error):
                    raise LoadError(f"the benchmark client failed: {error[:1000]}")
                case LoadDelta():
                    finished += message.finished
                    progress = LoadProgress(message.now_s, message.planned, finished, message.in_flight)
                    if ending is None and progress.planned:
                        ending = stop_rule(progress)
                        if ending is not None:
                            self._generator.send(EndLoad(ending.how))
                case Ready():
                    raise self._unreadable("it was ready already")

    def await_ready(self, cancelled: Callable[[], bool]) -> None:
        """Waits until a started client has finished its imports. Raises LoadError, Cancelled."""
        if self._awaiting_ready:
            try:
                self._receive(_START_TIMEOUT_S, cancelled)
            except LoadTimeoutError as error:
                # The engine is not involved here.
                raise LoadError(str(error)) from None
            self._awaiting_ready = False

    def close(self) -> None:
        """Ends the client."""
        self._generator.close()

    def _receive(self, timeout_s: float, cancelled: Callable[[], bool]) -> GeneratorMessage:
        deadline = time.monotonic() + timeout_s
        while (line := self._generator.poll()) == "":
            if cancelled():
                self.close()
                raise Cancelled
            if time.monotonic() > deadline:
                self.close()
                raise LoadTimeoutError(f"the benchmark client did not answer within {timeout_s:.0f} s")
        if line is None:
            self.close()
            raise LoadError(f"the benchmark client has died; see {self._generator.log}")
        try:
            return _MESSAGE.validate_json(line)
        except ValidationError as error:
            raise self._unreadable(str(error)) from None

    def _unreadable(self, why: str) -> LoadError:
        """Stops the client, whose next message might belong to this load, and returns the error to raise."""
        self.close()
        return LoadError(
            f"the benchmark client's answer can't be read: {' '.join(why.split())[:300]}; see {self._generator.log}"
        )


def _drain(process: subprocess.Popen[str], answers: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put(None)


def benchmark_argv(workload: Workload, base_url: str, model: str, tokenizer: str) -> list[str]:
    """The arguments of ``vllm bench serve``."""
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
    """The options of vLLM's dataset reader."""
    if workload.dataset_path is None:
        return {
            "random-input-len": workload.input_tokens,
            "random-output-len": workload.output_tokens,
            "random-range-ratio": workload.spread,
        }
    lengths = {"custom-output-len": -1} if workload.dataset_name is Dataset.CUSTOM else {}  # each line's own
    return {"dataset-path": workload.dataset_path, **lengths}
