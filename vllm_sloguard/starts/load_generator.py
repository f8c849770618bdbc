"""vLLM's benchmark client, kept running because importing it takes longer than most measurements.

Arguments, data sets and prompts are vLLM's; requests are sent by vllm_sloguard.starts.completion_client.

``python -m vllm_sloguard.starts.load_generator`` reads commands from standard input and writes messages to standard
output, both defined in vllm_sloguard.starts.load_protocol. It warms the engine up before the measured requests of a
load (vllm_sloguard.starts.warmup), and reports four times a second while the load runs.

Arrivals are a Poisson process, drawn before the first request is sent, so that the sidecar can compare the intended
with the actual send time of each request. A request that times out or returns fewer tokens than requested counts as
failed, with the reason: vLLM answers an aborted request with status 200.
"""

import asyncio
import functools
import importlib
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import uvloop

from vllm_sloguard.starts.completion_client import CompletionClient
from vllm_sloguard.starts.load_protocol import (
    End,
    EndLoad,
    GeneratorMessage,
    InFlight,
    LoadDelta,
    LoadFailure,
    LoadReport,
    Ready,
    RequestResult,
    RunLoad,
    WarmUp,
    command_from_json,
    message_line,
)
from vllm_sloguard.starts.wakeups import prompt_wakeups
from vllm_sloguard.starts.warmup import LONGEST_WARMUP_S, Batch, batch_size, most, settled

_PROGRESS_S = 0.25


@dataclass
class Sent:
    """One request. ``output`` is vLLM's own record, which grows as tokens arrive."""

    output: Any
    measured: bool
    intended_s: float
    start_s: float
    end_s: float = 0.0
    e2e_s: float | None = None
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        """None until the first token."""
        return self.output.ttft or None

    def result(self) -> RequestResult:
        """Of a failed request, only when it was sent and why it failed."""
        if self.error:
            return RequestResult(None, None, (), self.error, self.start_s, self.intended_s)
        return RequestResult(self.ttft_s, self.e2e_s, tuple(self.output.itl), "", self.start_s, self.intended_s)


@dataclass
class Load:
    """A running load, in one event loop; other threads call ``end`` through that loop."""

    timeout_s: float
    rate: float  # requests/s
    least_warm_ups: int
    planned: int = 0
    yielded: int = 0  # requests handed to the benchmark
    ended: int = 0
    in_flight: dict[int, Sent] = field(default_factory=dict[int, Sent])
    finished: list[Sent] = field(default_factory=list[Sent])
    reported: int = 0  # of the finished
    due: deque[float] = field(default_factory=deque[float])  # intended times of the requests handed out, not yet sent
    warm_up: list[Sent] = field(default_factory=list[Sent])
    warm_up_s: float = 0.0
    settled: bool = False
    measuring: bool = False
    ending: End | None = None
    session: Any = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, how: End) -> None:
        """Stops sending requests."""
        self.ending = how
        if how is End.STOP:
            self.over.set()

    async def drained(self) -> None:
        """Waits until every request handed to the benchmark has finished."""
        while self.ended < self.yielded:
            self.changed.clear()
            await self.changed.wait()

    async def paced(self, requests: list[Any], *_: Any, **__: Any) -> AsyncGenerator[Any]:
        """Replaces the benchmark's ``get_request``: first the warm-up, then the Poisson process."""
        spare = most(self.least_warm_ups)
        measured = requests[spare:]
        self.planned = len(measured)
        began = time.perf_counter()
        with prompt_wakeups():
            async for request in self._warming(requests[:spare], began):
                yield request, 0.0
            self.warm_up_s = time.perf_counter() - began
            self.measuring = True
            async for request in self._arriving(measured):
                yield request, self.rate
            await self.drained()
        self.over.set()

    async def _arriving(self, measured: list[Any]) -> AsyncGenerator[Any]:
        """Each request at its time, until the load is ended."""
        began = time.perf_counter()
        for request, offset_s in zip(measured, arrival_offsets(len(measured), self.rate), strict=True):
            due = began + offset_s
            await asyncio.sleep(0)  # at least once, for the events of a burst
            while (early_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(early_s)
            if self.ending is not None:
                return
            self.yielded += 1
            self.due.append(due)
            yield request

    async def _warming(self, spare: list[Any], began: float) -> AsyncGenerator[Any]:
        size = batch_size(self.least_warm_ups)
        batches: list[Batch] = []
        for first in range(0, len(spare), max(size, 1)):
            known = len(self.warm_up)
            for request in spare[first : first + size]:
                self.yielded += 1
                yield request
            await self.drained()
            good = [sent for sent in self.warm_up[known:] if not sent.error]
            ttfts = tuple(s.ttft_s for s in good if s.ttft_s is not None)
            batches.append(Batch(ttfts, tuple(itl for s in good for itl in s.output.itl)))
            self.settled = settled(batches)
            if self.settled or not good or self.ending or time.perf_counter() - began > LONGEST_WARMUP_S:
                return

    async def send(self, client: CompletionClient, request_func_input: Any, session: Any, **_progress_bar: Any) -> Any:
        """Replaces the benchmark's request function: sends with a deadline, and records."""
        self.session = session
        output = client.record(request_func_input)
        now = output.start_time
        # Requests are sent in the order in which the benchmark received them.
        sent = Sent(output, self.measuring, self.due.popleft() if self.due else now, now)
        self.in_flight[id(sent)] = sent
        try:
            async with asyncio.timeout(self.timeout_s):
                await client.send(request_func_input, output)
            sent.error = _error(request_func_input, output)
        except TimeoutError:
            sent.error = f"no answer within {self.timeout_s:g} s"
        else:
            sent.e2e_s = None if sent.error else sent.output.latency
        finally:
            del self.in_flight[id(sent)]
            sent.end_s = time.perf_counter()
            self.ended += 1
            self.changed.set()
        (self.finished if sent.measured else self.warm_up).append(sent)
        output.success, output.error = not sent.error, sent.error
        return output

    def flying(self) -> tuple[InFlight, ...]:
        """The measured requests in flight."""
        return tuple(InFlight(sent.start_s, sent.ttft_s) for sent in self.in_flight.values() if sent.measured)

    def delta(self) -> LoadDelta:
        """What has changed since the previous delta."""
        new = tuple(sent.result() for sent in self.finished[self.reported :])
        self.reported = len(self.finished)
        return LoadDelta(time.perf_counter(), self.planned, new, self.flying())

    def report(self, cancelled: int) -> LoadReport:
        """The report of the complete load."""
        ended = sorted(self.finished, key=lambda sent: sent.start_s)
        duration_s = max(sent.end_s for sent in ended) - ended[0].start_s if ended else 0.0
        warm_up = WarmUp(len(self.warm_up), self.warm_up_s, self.settled)
        return LoadReport(tuple(sent.result() for sent in ended), duration_s, self.planned, cancelled, warm_up)


def arrival_offsets(count: int, rate: float) -> Sequence[float]:
    """The send times of ``count`` requests, in seconds: a Poisson process scaled to last ``count / rate``.

    Drawn from numpy's global generator, which the benchmark has seeded.
    """
    import numpy as np

    offsets = np.cumsum(np.random.exponential(1 / rate, count))
    return [float(offset) for offset in offsets * (count / rate / offsets[-1])]


class Client:
    """vLLM's benchmark, with its request function and pacing replaced."""

    def __init__(self, answers: TextIO) -> None:
        from vllm.benchmarks import serve
        from vllm.benchmarks.lib import endpoint_request_func as lib
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self._serve: Any = serve
        self._lib: Any = lib
        self._answers = answers
        self._parser = FlexibleArgumentParser()
        serve.add_cli_args(self._parser)
        # Every trial uses the same tokenizer.
        self._serve.get_tokenizer = functools.cache(self._serve.get_tokenizer)
        self._lock = threading.Lock()
        self._running: tuple[asyncio.AbstractEventLoop, Load] | None = None

    def write(self, message: GeneratorMessage) -> None:
        """Writes one line."""
        self._answers.write(message_line(message) + "\n")
        self._answers.flush()

    def end(self, how: End) -> None:
        """Called by the reading thread: ends the running load; if there is none, it has just ended by itself."""
        with self._lock:
            if self._running is not None:
                loop, load = self._running
                loop.call_soon_threadsafe(load.end, how)

    def attempt(self, order: RunLoad) -> LoadReport | LoadFailure:
        """Runs one load to its end."""
        try:
            # Closing the event loop cancels and awaits any tasks that the benchmark left behind.
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(self._run(order))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the process boundary: the sidecar reports it
            return LoadFailure(f"{type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._running = None

    async def _run(self, order: RunLoad) -> LoadReport:
        arguments = self._parser.parse_args(list(order.argv))
        assert arguments is not None
        if arguments.dataset_name == "custom":
            _pandas()
        load = Load(order.request_timeout_s, float(arguments.request_rate), order.warmup_requests)
        arguments.num_prompts += most(load.least_warm_ups)
        client = CompletionClient(self._lib.RequestFuncOutput)
        self._lib.ASYNC_REQUEST_FUNCS["openai"] = functools.partial(load.send, client)
        self._serve.get_request = load.paced
        with self._lock:
            self._running = (asyncio.get_running_loop(), load)
        benchmark = asyncio.create_task(self._serve.main_async(arguments))
        over = asyncio.create_task(load.over.wait())
        while not (await asyncio.wait({benchmark, over}, timeout=_PROGRESS_S, return_when=asyncio.FIRST_COMPLETED))[0]:
            self.write(load.delta())
        cancelled = len(load.flying())
        if benchmark.done():
            benchmark.result()  # it failed before the load was over, unless both happened at once
        # Only the benchmark's own statistics remain to be done.
        benchmark.cancel()
        await asyncio.wait({benchmark})
        report = load.report(cancelled)
        client.close()
        if load.session is not None:
            await load.session.close()
        return report


def _pandas() -> None:
    """Raises ModuleNotFoundError if pandas is missing, for which vLLM's own error misleadingly blames vllm."""
    try:
        importlib.import_module("pandas")
    except ImportError:
        raise ModuleNotFoundError("custom prompts are read with pandas: pip install pandas beside vLLM") from None


def _error(request: Any, output: Any) -> str:
    """Why the request counts as failed; empty if it succeeded."""
    if not output.success:
        return output.error or "failed without a reason"
    if request.ignore_eos and output.output_tokens < request.output_len:
        return f"aborted after {output.output_tokens} of {request.output_len} tokens"
    return ""


def main() -> int:
    """Runs until the end of the input."""
    # The benchmark prints to standard output, so messages use a duplicate of it.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    client = Client(answers)
    loads: queue.Queue[RunLoad | None] = queue.Queue()
    threading.Thread(target=_read, args=(client, loads), daemon=True).start()
    client.write(Ready())
    while (order := loads.get()) is not None:
        client.write(client.attempt(order))
    return 0


def _read(client: Client, loads: "queue.Queue[RunLoad | None]") -> None:
    """Dispatches commands as they arrive."""
    for line in sys.stdin:
        match command_from_json(line):
            case EndLoad(how):
                client.end(how)
            case RunLoad() as order:
                loads.put(order)
    client.end(End.STOP)
    loads.put(None)


if __name__ == "__main__":
    sys.exit(main())
