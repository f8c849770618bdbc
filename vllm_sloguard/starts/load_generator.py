"""vLLM's own benchmark client, kept alive: importing it takes longer than most measurements.

``python -m vllm_sloguard.starts.load_generator`` reads one JSON object a line from its standard input:

    {"argv": ["--model", ...], "request_timeout_s": 60, "warmup_requests": 8}

``argv`` is that of ``vllm bench serve``; the requests of the warm-up (see vllm_sloguard.starts.warmup) are others than
the ``--num-prompts`` that are measured. While the load runs it writes, every quarter of a second,

    {"progress": {"now": 12.5, "planned": 300, "finished": [REQUEST, ...], "in_flight": [[START, TTFT or null], ...]}}

of the measured requests, with those that have finished since the last such line, and takes

    {"end": "enough"}   no more requests are sent, those in flight are waited for
    {"end": "stop"}     those in flight are cancelled, which aborts them in the engine

At the end it answers with ``{"result": {...}}`` or ``{"error": "..."}``. Times are seconds on the clock of ``now``. A
request counts as failed, with its reason, when it is answered late or with fewer tokens than were asked for: vLLM
answers an aborted request with status 200.
"""

import asyncio
import contextvars
import functools
import importlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from vllm_sloguard.starts.warmup import LONGEST_WARMUP_S, Batch, batch_size, most, settled

RequestFunction = Callable[..., Awaitable[Any]]

_PROGRESS_S = 0.25
_ENOUGH, _STOP = "enough", "stop"


@dataclass
class Sent:
    """One request. ``output`` is vLLM's own record, which grows as the tokens come in."""

    measured: bool
    start_s: float
    output: Any = None
    end_s: float = 0.0
    e2e_s: float | None = None
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        """None until the first token."""
        return (self.output.ttft or None) if self.output is not None else None

    def finished(self) -> dict[str, Any]:
        """As it is told of; of a failed request, only when it began and why it failed."""
        good = not self.error
        return {
            "start": self.start_s,
            "ttft": self.ttft_s if good else None,
            "e2e": self.e2e_s,
            "itls": list(self.output.itl) if good and self.output is not None else [],
            "error": self.error,
        }


# The request whose coroutine runs: vLLM makes its record inside of it.
_CURRENT: contextvars.ContextVar[Sent | None] = contextvars.ContextVar("sent", default=None)


@dataclass
class Load:
    """One load while it runs. It lives in one event loop; only ``end`` is called from another thread, through it."""

    timeout_s: float
    least_warm_ups: int
    planned: int = 0
    yielded: int = 0  # requests that were handed to the benchmark
    ended: int = 0
    in_flight: dict[int, Sent] = field(default_factory=dict[int, Sent])
    finished: list[Sent] = field(default_factory=list[Sent])
    told: int = 0  # of the finished
    warm_up: list[Sent] = field(default_factory=list[Sent])
    warm_up_s: float = 0.0
    settled: bool = False
    measuring: bool = False
    how: str = ""  # it is to end
    session: Any = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, how: str) -> None:
        """Takes "enough" or "stop"."""
        self.how = how
        if how == _STOP:
            self.over.set()

    async def drained(self) -> None:
        """Waits until every request that was handed out has ended."""
        while self.ended < self.yielded:
            self.changed.clear()
            await self.changed.wait()

    async def paced(
        self, plain: Callable[..., Any], requests: list[Any], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any]:
        """Stands in for the benchmark's ``get_request``: the warm-up first, then what ``plain`` makes of the rest."""
        spare = most(self.least_warm_ups)
        measured = requests[spare:]
        self.planned = len(measured)
        began = time.perf_counter()
        async for request in self._warming(requests[:spare], began):
            yield request, 0.0
        self.warm_up_s = time.perf_counter() - began
        self.measuring = True
        async for request in plain(measured, *args, **kwargs):
            if self.how:
                break
            self.yielded += 1
            yield request
        await self.drained()
        self.over.set()

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
            if self.settled or not good or self.how or time.perf_counter() - began > LONGEST_WARMUP_S:
                return

    async def send(self, plain: RequestFunction, request_func_input: Any, session: Any, **kwargs: Any) -> Any:
        """Stands in for the benchmark's request function: ``plain`` with a deadline, and a record of it."""
        self.session = session
        sent = Sent(self.measuring, time.perf_counter())
        self.in_flight[id(sent)] = sent
        _CURRENT.set(sent)
        try:
            answered = plain(request_func_input=request_func_input, session=session, **kwargs)
            sent.output = await asyncio.wait_for(answered, self.timeout_s)
            sent.error = _error(request_func_input, sent.output)
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
        sent.output.success, sent.output.error = not sent.error, sent.error
        return sent.output

    def flying(self) -> list[tuple[float, float | None]]:
        """Start and TTFT of each measured request in flight."""
        return [(sent.start_s, sent.ttft_s) for sent in self.in_flight.values() if sent.measured]

    def progress(self) -> dict[str, Any]:
        """What is new; the number planned is 0 until the load is known."""
        new = [sent.finished() for sent in self.finished[self.told :]]
        self.told = len(self.finished)
        return {"now": time.perf_counter(), "planned": self.planned, "finished": new, "in_flight": self.flying()}

    def result(self, flying: list[tuple[float, float | None]]) -> dict[str, Any]:
        """Everything, in columns as vLLM's ``--save-detailed`` has it; ``in_flight`` are those that were cancelled."""
        ended = sorted(self.finished, key=lambda sent: sent.start_s)
        rows = [sent.finished() for sent in ended]
        return {
            "start_times": [row["start"] for row in rows],
            "ttfts": [row["ttft"] for row in rows],
            "latencies": [row["e2e"] for row in rows],
            "itls": [row["itls"] for row in rows],
            "errors": [row["error"] for row in rows],
            "duration": max(sent.end_s for sent in ended) - ended[0].start_s if ended else 0.0,
            "planned": self.planned,
            "in_flight": flying,
            "warm_up": {"requests": len(self.warm_up), "seconds": self.warm_up_s, "settled": self.settled},
        }


class Client:
    """The benchmark, with its request function, its pace and its records under watch."""

    def __init__(self, answers: TextIO) -> None:
        from vllm.benchmarks import serve
        from vllm.benchmarks.lib import endpoint_request_func as lib
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self._serve: Any = serve
        self._lib: Any = lib
        self._answers = answers
        self._send, self._pace = self._lib.ASYNC_REQUEST_FUNCS["openai"], self._serve.get_request
        self._parser = FlexibleArgumentParser()
        serve.add_cli_args(self._parser)
        # Each trial asks for the same tokenizer again.
        self._serve.get_tokenizer = functools.cache(self._serve.get_tokenizer)
        self._lib.RequestFuncOutput = _recorded(self._lib.RequestFuncOutput)
        self._lock = threading.Lock()
        self._running: tuple[asyncio.AbstractEventLoop, Load] | None = None

    def tell(self, answer: dict[str, Any]) -> None:
        """Writes one line."""
        self._answers.write(json.dumps(answer, default=float) + "\n")
        self._answers.flush()

    def end(self, how: str) -> None:
        """From the thread that reads: ends the load that runs; without one, the load has just ended by itself."""
        with self._lock:
            if self._running is not None:
                loop, load = self._running
                loop.call_soon_threadsafe(load.end, how)

    def attempt(self, request: dict[str, Any]) -> dict[str, Any]:
        """Runs one load to its answer."""
        try:
            # The end of its event loop cancels, and waits for, whatever the benchmark has left behind.
            return {"result": asyncio.run(self._run(request))}
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the process boundary: it is an answer too
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            with self._lock:
                self._running = None

    async def _run(self, request: dict[str, Any]) -> dict[str, Any]:
        arguments = self._parser.parse_args(request["argv"])
        assert arguments is not None
        if arguments.dataset_name == "custom":
            _pandas()
        load = Load(float(request["request_timeout_s"]), int(request["warmup_requests"]))
        arguments.num_prompts += most(load.least_warm_ups)
        self._lib.ASYNC_REQUEST_FUNCS["openai"] = functools.partial(load.send, self._send)
        self._serve.get_request = functools.partial(load.paced, self._pace)
        with self._lock:
            self._running = (asyncio.get_running_loop(), load)
        benchmark = asyncio.create_task(self._serve.main_async(arguments))
        over = asyncio.create_task(load.over.wait())
        while not (await asyncio.wait({benchmark, over}, timeout=_PROGRESS_S, return_when=asyncio.FIRST_COMPLETED))[0]:
            self.tell({"progress": load.progress()})
        flying = load.flying()
        if benchmark.done():
            benchmark.result()  # it has failed before the load was over, unless both came at once
        # What is left of it is its own statistics.
        benchmark.cancel()
        await asyncio.wait({benchmark})
        result = load.result(flying)
        if load.session is not None:
            await load.session.close()
        return result


def _pandas() -> None:
    """vLLM says of a missing pandas that vllm is missing. Raises ModuleNotFoundError."""
    try:
        importlib.import_module("pandas")
    except ImportError:
        raise ModuleNotFoundError("custom prompts are read with pandas: pip install pandas beside vLLM") from None


def _recorded(plain: Any) -> Any:
    """vLLM's record of a request, found while it is still being written."""

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        sent = _CURRENT.get()
        if sent is not None:
            sent.output = output
        return output

    return recorded


def _error(request: Any, output: Any) -> str:
    """Why the request counts as failed; empty when it succeeded."""
    if not output.success:
        return output.error or "failed without a reason"
    if request.ignore_eos and output.output_tokens < request.output_len:
        return f"aborted after {output.output_tokens} of {request.output_len} tokens"
    return ""


def main() -> int:
    """Serves until the end of the input."""
    # The benchmark prints to standard output; the answers get the real one for themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    client = Client(answers)
    requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(client, requests), daemon=True).start()
    client.tell({"ready": True})
    while (request := requests.get()) is not None:
        client.tell(client.attempt(request))
    return 0


def _read(client: Client, requests: "queue.Queue[dict[str, Any] | None]") -> None:
    """Takes the lines of the input, as they come, to where they belong."""
    for line in sys.stdin:
        given = json.loads(line)
        if "end" in given:
            client.end(given["end"])
        else:
            requests.put(given)
    client.end(_STOP)
    requests.put(None)


if __name__ == "__main__":
    sys.exit(main())
