"""Measures the plugin's overhead on real vLLM: each hook timed in place, and an A/B test of the hooks in one engine.

``python benchmarks/plugin_cost.py`` starts one engine in this process (AsyncLLM, so this process is the API server) and
a sidecar's telemetry service in another. First each hook is timed at every batch size, with an inner timer around
vLLM's own method and an outer one around the hook. Then, without timers and under saturating load, the hooks are
switched off and on every few seconds; neighbouring periods form a pair, and the mean difference of the pairs gets a
95% interval. Weights are random; prompts are token ids. Results go to a JSONL file, one line per figure.
"""

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "fork")  # newer versions fork anyway
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1024},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151936},
}
HEADS = {"tiny": (4, 2), "1.5b": (12, 2)}
# After a switch, requests and steps from before it are still in flight.
SETTLE_S = 0.4
HUB = """
import sys, time
from pathlib import Path
from sidecar.observe.telemetry import TelemetryHub
from sidecar.engine.live_knobs import LiveHub
from sidecar.rpc import serve_unix_socket
from vllm_sloguard.wire.live_pb2_grpc import add_LiveServiceServicer_to_server
from vllm_sloguard.wire.telemetry_pb2_grpc import add_TelemetryServiceServicer_to_server
hub, live = TelemetryHub(), LiveHub(1)
hub.expect("cost"), live.expect("cost")
def register(server):
    add_TelemetryServiceServicer_to_server(hub, server), add_LiveServiceServicer_to_server(live, server)
server = serve_unix_socket(Path(sys.argv[1]), register)
print("up", flush=True)
while sys.stdin.readline():
    engine = hub.of("cost")
    counts = engine.recorder.ended, sum(engine.dropped.values()), sum(engine.hook_errors.values())
    print(*counts, hub.traffic("cost").gaps_after(0).n, flush=True)
"""


@dataclass
class Timer:
    """Wall-clock time spent in one method, in seconds."""

    seconds: float = 0.0
    calls: int = 0

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began
                self.calls += 1

        return timed


@dataclass(frozen=True)
class Hooked:
    """A vLLM method wrapped by the plugin, with timers inside and outside the hook."""

    owner: Any
    name: str
    original: Any
    inner: Timer = field(default_factory=Timer)
    outer: Timer = field(default_factory=Timer)

    def time_inside(self) -> None:
        """To call before the plugin wraps the method."""
        setattr(self.owner, self.name, self.inner.around(self.original))

    def time_outside(self) -> Any:
        """To call once the plugin has wrapped it; returns the hook."""
        hook = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.outer.around(hook))
        return hook

    def own(self) -> tuple[float, int]:
        """Seconds in the hook itself, minus the timer's own cost, and calls; resets the timers."""
        found = max(self.outer.seconds - self.inner.seconds - timer_cost_s() * self.outer.calls, 0.0), self.outer.calls
        self.outer.seconds = self.inner.seconds = 0.0
        self.outer.calls = self.inner.calls = 0
        return found


def timer_cost_s(calls: int = 20_000) -> float:
    """The overhead that a timer adds to the enclosing code, per call."""
    timer = Timer()
    empty = timer.around(lambda: None)
    began = time.perf_counter()
    for _ in range(calls):
        empty()
    return max((time.perf_counter() - began) / calls, 0.0)


@dataclass
class Meter:
    """Client-side figures of one period."""

    tokens: int = 0
    gaps: list[float] = field(default_factory=list[float])

    def arrived(self, tokens: int, gap_s: float | None) -> None:
        """Tokens of one request, ``gap_s`` after the previous ones."""
        self.tokens += tokens
        if gap_s is not None:
            self.gaps.append(gap_s)


@dataclass(frozen=True)
class Period:
    """One period with the hooks on or off."""

    on: bool
    tokens_per_s: float
    tpot_ms: float
    itl_p99_ms: float


class Load:
    """``concurrency`` clients, each with one request at a time."""

    def __init__(self, llm: Any, concurrency: int, vocabulary: int, lengths: tuple[int, int]) -> None:
        self.meter = Meter()
        self._llm, self._vocabulary, (self._input, self._output) = llm, vocabulary, lengths
        self._draw = random.Random(concurrency)  # noqa: S311 - prompts, no secret
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(concurrency)]

    async def _client(self, number: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sent = 0
        while True:
            # Staggered, because clients that start together would finish together.
            tokens = self._draw.randint(self._output // 2, self._output)
            params = SamplingParams(
                max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
            )
            prompt = {"prompt_token_ids": [self._draw.randrange(10, self._vocabulary) for _ in range(self._input)]}
            before: float | None = None
            async for output in self._llm.generate(prompt, params, f"{number}-{sent}"):
                now = time.perf_counter()
                self.meter.arrived(len(output.outputs[0].token_ids), None if before is None else now - before)
                before = now
            sent += 1

    async def stop(self) -> None:
        """Cancels what is in flight."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Bench:
    """The engine, its hooks, and where results go."""

    def __init__(self, options: argparse.Namespace, results: Path) -> None:
        self.options, self.results = options, results
        self.api: list[Hooked] = []
        self.hooks: dict[tuple[Any, str], Any] = {}
        self.record = Timer()
        self.sender_s = [0.0]
        self.llm: Any = None

    def write(self, **figure: Any) -> None:
        """Appends one line."""
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"shape": self.options.shape, **figure}) + "\n")
        print({name: value for name, value in figure.items() if name != "periods"}, flush=True)

    def start(self, folder: Path) -> None:
        """Installs the timers and starts the engine."""
        from vllm.plugins import load_general_plugins
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.engine.output_processor import OutputProcessor
        from vllm.v1.metrics.stats import IterationStats

        for owner, name in (
            (IterationStats, "update_from_events"),
            (IterationStats, "update_from_finished_request"),
            (OutputProcessor, "add_request"),
            (OutputProcessor, "abort_requests"),
        ):
            self.api.append(Hooked(owner, name, getattr(owner, name)))
        for hooked in self.api:
            hooked.time_inside()
        install_core_timers(EngineCore)
        load_general_plugins()
        from vllm.engine.arg_utils import AsyncEngineArgs

        from vllm_sloguard.hooks import request_hooks
        from vllm_sloguard.hooks.stat_logger import SloguardStatLogger
        from vllm_sloguard.hooks.telemetry_client import TelemetryClient

        request_hooks.install()
        for hooked in self.api:
            self.hooks[hooked.owner, hooked.name] = hooked.time_outside()
        SloguardStatLogger.record = self.record.around(SloguardStatLogger.record)
        TelemetryClient._send_all = cpu_timed(TelemetryClient._send_all, self.sender_s)  # pyright: ignore
        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(write_model(folder / "model", self.options.shape)),
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=2048,
                max_num_seqs=max(*self.options.batches, *self.options.concurrency),
                **json.loads(self.options.engine_args),
            )
        )

    async def core(self, method: str, *args: Any) -> Any:
        """Calls a method in the engine core's process."""
        return await self.llm.engine_core.call_utility_async(method, *args)

    async def switch(self, *, on: bool) -> None:
        """Installs or removes the hooks in both processes."""
        for hooked in self.api:
            hook = self.hooks[hooked.owner, hooked.name]
            setattr(hooked.owner, hooked.name, hook if on else hooked.original)
        for adapter in self.llm.logger_manager.stat_loggers:
            for logger in getattr(adapter, "per_engine_stat_loggers", {}).values():
                if hasattr(logger, "collect"):
                    logger._active = on
        await self.core("sloguard_switch", on)

    async def time_hooks(self, batch: int) -> None:
        """Part one: hook timings at one batch size."""
        load = Load(self.llm, batch, SHAPES[self.options.shape]["vocab_size"], self.options.lengths)
        await asyncio.sleep(self.options.warm_up)
        before, began = time.process_time(), time.perf_counter()
        for hooked in self.api:
            hooked.own()
        steps_before, self.record.seconds, self.sender_s[0] = self.record.calls, 0.0, 0.0
        await self.core("sloguard_costs", True)
        await asyncio.sleep(self.options.timed)
        core = await self.core("sloguard_costs", False)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - before
        steps = max(self.record.calls - steps_before, 1)
        common = {"kind": "hook", "batch": batch, "steps": steps, "step_ms": 1000 * seconds / steps}

        def row(process: str, hook: str, spent_s: float, calls: int, process_cpu_s: float) -> None:
            self.write(
                **common,
                process=process,
                hook=hook,
                calls=calls,
                us_per_call=1e6 * spent_s / max(calls, 1),
                us_per_step=1e6 * spent_s / steps,
                share_of_time=spent_s / seconds,
                share_of_cpu=spent_s / max(process_cpu_s, 1e-9),
            )

        row("api_server", "record", self.record.seconds - timer_cost_s() * steps, steps, cpu_s)
        for hooked in self.api:
            row("api_server", hooked.name, *hooked.own(), cpu_s)
        finished = max(1, round(seconds))
        row("api_server", "sending thread (CPU)", self.sender_s[0], finished, cpu_s)
        row("engine_core", "schedule", core["schedule_s"], core["calls"], core["cpu_s"])
        row("engine_core", "live thread (CPU)", core["live_s"], finished, core["cpu_s"])
        await load.stop()

    async def compare(self, concurrency: int) -> None:
        """Part two: the A/B test at one load."""
        load = Load(self.llm, concurrency, SHAPES[self.options.shape]["vocab_size"], self.options.lengths)
        await asyncio.sleep(self.options.warm_up)
        periods: list[Period] = []
        for number in range(self.options.switches):
            on = number % 4 in (0, 3)  # on, off, off, on: a drift affects both sides
            await self.switch(on=on)
            await asyncio.sleep(SETTLE_S)
            load.meter, began = Meter(), time.perf_counter()
            await asyncio.sleep(self.options.period - SETTLE_S)
            meter, seconds = load.meter, time.perf_counter() - began
            gaps = sorted(meter.gaps)
            p99_ms = 1000 * gaps[math.ceil(0.99 * len(gaps)) - 1]
            periods.append(Period(on, meter.tokens / seconds, 1000 * statistics.fmean(gaps), p99_ms))
        await self.switch(on=True)
        await load.stop()
        for name in ("tokens_per_s", "tpot_ms", "itl_p99_ms"):
            self.write(kind="ab", concurrency=concurrency, figure=name, **paired(periods, name))
        self.write(kind="ab_periods", concurrency=concurrency, periods=[asdict(p) for p in periods])


def paired(periods: list[Period], name: str) -> dict[str, Any]:
    """Mean of the pairwise differences, on against off, in percent, with its 95% interval."""
    from scipy.stats import t  # pyright: ignore[reportMissingTypeStubs]

    differences: list[float] = []
    for first, second in zip(periods[::2], periods[1::2], strict=False):
        on, off = (first, second) if first.on else (second, first)
        differences.append(100 * (getattr(on, name) / getattr(off, name) - 1))
    mean = statistics.fmean(differences)
    half = float(t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))  # pyright: ignore
    off_level = statistics.fmean(getattr(p, name) for p in periods if not p.on)
    return {
        "pairs": len(differences), "percent": mean, "low": mean - half, "high": mean + half, "off": off_level,
        "median": statistics.median(differences),
    }  # fmt: skip


def cpu_timed(method: Any, spent: list[float]) -> Any:
    """``method``, accumulating its thread's CPU time."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return method(*args, **kwargs)
        finally:
            spent[0] += time.thread_time() - began

    return timed


def install_core_timers(engine_core: Any) -> None:
    """Sets up timers and the switch in the engine core's process, which is forked from this one."""
    from vllm.v1.core.sched.scheduler import Scheduler

    schedule = Hooked(Scheduler, "schedule", Scheduler.schedule)
    schedule.time_inside()
    kept: dict[str, Any] = {}

    def switch(_core: Any, on: bool) -> None:
        if "hook" not in kept:
            kept["hook"] = Scheduler.schedule
        Scheduler.schedule = kept["hook"] if on else schedule.original

    def costs(_core: Any, begin: bool) -> dict[str, float]:
        if "hook" not in kept:
            kept["hook"] = schedule.time_outside()
        spent_s, calls = schedule.own()
        now = time.process_time(), _thread_cpu_s("sloguard-live")
        before, kept["at"] = kept.get("at", now), now
        del begin
        return {"schedule_s": spent_s, "calls": calls, "cpu_s": now[0] - before[0], "live_s": now[1] - before[1]}

    engine_core.sloguard_switch, engine_core.sloguard_costs = switch, costs


def _thread_cpu_s(name: str) -> float:
    """User and system time of this process's threads with that name."""
    import threading

    ticks = 0
    for thread in threading.enumerate():
        if thread.name == name and thread.native_id is not None:
            fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def write_model(folder: Path, shape: str) -> Path:
    """A Qwen2 of that shape, configuration only."""
    folder.mkdir(parents=True)
    heads, kv_heads = HEADS[shape]
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **SHAPES[shape],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


async def run(bench: Bench) -> None:
    """Both parts."""
    for batch in bench.options.batches:
        await bench.time_hooks(batch)
    for concurrency in bench.options.concurrency:
        await bench.compare(concurrency)


def numbers(text: str) -> list[int]:
    """Parses "1,64" into a list."""
    return [int(part) for part in text.split(",") if part]


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--batches", type=numbers, default=[1, 64, 256, 1000], help="batch sizes for the timed hooks")
    parser.add_argument("--concurrency", type=numbers, default=[64, 256], help="loads for the comparison")
    parser.add_argument("--switches", type=int, default=80)
    parser.add_argument("--period", type=float, default=3.0, help="seconds between two switches")
    parser.add_argument("--timed", type=float, default=10.0, help="seconds of timed hooks at each batch size")
    parser.add_argument("--warm-up", type=float, default=5.0)
    parser.add_argument("--lengths", type=lambda text: tuple(numbers(text)), default=(128, 256), help="input,output")
    parser.add_argument("--engine-args", default="{}", help="JSON of further engine arguments")
    parser.add_argument("--results", type=Path, default=Path("build/plugin-cost.jsonl"))
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        socket = f"{name}/s"
        os.environ |= {"SLOGUARD_SOCKET": socket, "SLOGUARD_ENGINE_ID": "cost", "SLOGUARD_REPAIR": "off"}
        pipe = subprocess.PIPE
        with subprocess.Popen([sys.executable, "-c", HUB, socket], stdin=pipe, stdout=pipe, text=True) as hub:
            assert hub.stdin is not None
            assert hub.stdout is not None
            hub.stdout.readline()
            bench = Bench(options, options.results)
            bench.start(Path(name))
            asyncio.run(run(bench))
            time.sleep(2)
            hub.stdin.write("\n")
            hub.stdin.flush()
            ended, dropped, errors, gaps = map(int, hub.stdout.readline().split())
            bench.write(kind="telemetry", ended=ended, dropped=dropped, hook_errors=errors, gaps=gaps)
            bench.llm.shutdown()
            hub.terminate()
    return 0 if errors == 0 and dropped == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
