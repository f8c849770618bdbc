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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from plugin_timers import Hooked, SenderTimers, Spent, Timer, install_core_timers, print_hook_failures

from vllm_sloguard.latency import percentile, tpot

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1024},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151936},
}
HEADS = {"tiny": (4, 2), "1.5b": (12, 2)}
# After a switch the sending thread still has work of the period before; what it has to send is sent at the switch.
SETTLE_S = 0.8
HUB = """
import sys, time
from pathlib import Path
from sidecar.observe.telemetry import TelemetryHub
from sidecar.engine.live_knobs import LiveHub
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.wire.live_pb2_grpc import add_LiveServiceServicer_to_server
from vllm_sloguard.wire.telemetry_pb2_grpc import add_TelemetryServiceServicer_to_server
hub, live = TelemetryHub(), LiveHub(1)
hub.expect("cost"), live.expect("cost")
def register(server):
    add_TelemetryServiceServicer_to_server(hub, server), add_LiveServiceServicer_to_server(live, server)
server = serve_unix_socket(Path(sys.argv[1]), register)
print("up", flush=True)
while line := sys.stdin.readline():
    if line.startswith("seqs "):
        print(live.change("cost", {"max_num_seqs": int(line.split()[1])}, 30).applied_s, flush=True)
        continue
    engine = hub.of("cost")
    counts = engine.recorder.ended, sum(engine.dropped.values()), sum(engine.hook_errors.values())
    print(*counts, hub.traffic("cost").gaps_after(0).n, flush=True)
"""


@dataclass
class Meter:
    """What clients see in one period."""

    tokens: int = 0
    gaps: list[float] = field(default_factory=list[float])

    def arrived(self, tokens: int, gap_s: float | None) -> None:
        """Tokens of one request, ``gap_s`` after the ones before."""
        self.tokens += tokens
        if gap_s is not None:
            self.gaps.append(gap_s)


@dataclass(frozen=True)
class Period:
    """One stretch of time with the hooks on or off."""

    on: bool
    tokens_per_s: float
    tpot_ms: float
    itl_p99_ms: float
    api_cpu_us_a_token: float = 0.0


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
            # Clients that begin at once would end at once.
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

    def check(self) -> None:
        """Raises what ended a client."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def stop(self) -> None:
        """Cuts what is in flight."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Bench:
    """The engine, its hooks, and where results go."""

    def __init__(self, options: argparse.Namespace, hub: "subprocess.Popen[str]") -> None:
        self.options, self.hub = options, hub
        self.results: Path = options.results
        self.api: list[Hooked] = []
        self.hooks: dict[tuple[Any, str], Any] = {}
        self.record = Timer()
        self.sender = SenderTimers()
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
        install_core_timers()
        load_general_plugins()
        print_hook_failures()
        from vllm.engine.arg_utils import AsyncEngineArgs

        from vllm_sloguard.hooks import request_hooks
        from vllm_sloguard.hooks.stat_logger import SloguardStatLogger

        request_hooks.install()
        for hooked in self.api:
            self.hooks[hooked.owner, hooked.name] = hooked.time_outside()
        SloguardStatLogger.record = self.record.around(SloguardStatLogger.record)
        self.sender.install()
        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(write_model(folder / "model", self.options.shape)),
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=2048,
                max_num_seqs=self.most_sequences + 2,
                **json.loads(self.options.engine_args),
            )
        )

    @property
    def most_sequences(self) -> int:
        """The largest batch."""
        return max(*self.options.batches, *self.options.concurrency)

    def ask_hub(self, line: str) -> str:
        """One line to the sidecar's services, and their answer."""
        assert self.hub.stdin is not None
        assert self.hub.stdout is not None
        self.hub.stdin.write(line + "\n")
        self.hub.stdin.flush()
        return self.hub.stdout.readline()

    async def core(self, method: str, *args: Any) -> Any:
        """Calls a method of the engine core's process."""
        return await self.llm.engine_core.call_utility_async(method, *args)

    async def switch(self, *, on: bool) -> None:
        """Puts the hooks in or takes them out, in both processes."""
        from vllm_sloguard.hooks import plugin

        for hooked in self.api:
            hook = self.hooks[hooked.owner, hooked.name]
            setattr(hooked.owner, hooked.name, hook if on else hooked.original)
        for logger in self.stat_loggers():
            logger._active = on
        await self.core("sloguard_switch", on)
        if (client := plugin.link()) is not None:
            await asyncio.to_thread(client.flush, SETTLE_S / 2)

    async def check_installed(self) -> bool:
        """Whether every hook is in place, in both processes."""
        api = {name: bool(getattr(hook, "sloguard", False)) for (_, name), hook in self.hooks.items()}
        core = await self.core("sloguard_installed")
        self.write(kind="installed", api_server=api, engine_core=core, loggers=len(self.stat_loggers()))
        return all(api.values()) and all(core.values()) and bool(self.stat_loggers())

    def stat_loggers(self) -> list[Any]:
        """The plugin's stat loggers."""
        adapters = self.llm.logger_manager.stat_loggers
        loggers = [lo for adapter in adapters for lo in getattr(adapter, "per_engine_stat_loggers", {}).values()]
        return [logger for logger in loggers if hasattr(logger, "digest")]

    async def time_hooks(self, batch: int, *, changed: bool) -> None:
        """Part one, at one batch size; ``changed``: while a live change is in force."""
        load = Load(self.llm, batch, SHAPES[self.options.shape]["vocab_size"], self.options.lengths)
        await asyncio.sleep(self.options.warm_up)
        await self.core("sloguard_costs")
        for hooked in self.api:
            hooked.own()
        self.sender.take()
        self.record.take()
        cpu_before, began = time.process_time(), time.perf_counter()
        await asyncio.sleep(self.options.timed)
        core = await self.core("sloguard_costs")
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_before
        load.check()
        record = self.record.take()
        hooks = {hooked.name: hooked.own()[0] for hooked in self.api}
        steps_s, requests_s = self.sender.take()
        await load.stop()
        requests, steps = hooks["update_from_finished_request"].calls, record.calls
        schedule = Spent(core["schedule_s"], core["schedule_cpu_s"], core["steps"])
        live = Spent(core["live_s"], core["live_s"], core["steps"])
        sending = Spent(steps_s, steps_s, steps)
        ends = Spent(requests_s, requests_s, requests)
        figures = [
            ("api_server", "record", record),
            *(("api_server", name, spent) for name, spent in hooks.items()),
            ("api_server", "sending thread, steps (CPU)", sending),
            ("api_server", "sending thread, requests (CPU)", ends),
            ("engine_core", "schedule", schedule),
            ("engine_core", "live thread (CPU)", live),
        ]
        common = {"batch": batch, "changed": changed, "seconds": seconds, "steps": steps, "requests": requests}
        for process, hook, spent in figures:
            us, cpu_us = (1e6 * s / max(spent.calls, 1) for s in (spent.wall_s, spent.cpu_s))
            share = spent.wall_s / max(core["cpu_s"] if process == "engine_core" else cpu_s, 1e-9)
            figure = {"calls": spent.calls, "us": us, "cpu_us": cpu_us, "share_of_cpu": share}
            self.write(kind="hook", **common, process=process, hook=hook, **figure)
        for spent in hooks.values():
            ends = ends.plus(spent)
        goals: dict[str, float] = {"step_ms": 1000 * seconds / max(steps, 1), "hooked_steps": core["hooked"]}
        for name, spent, calls in (
            ("engine_core_us_a_step", schedule.plus(live), core["steps"]),
            ("api_server_us_a_step", record.plus(sending), steps),
            ("us_a_finished_request", ends, requests),
        ):
            goals[name] = 1e6 * spent.wall_s / max(calls, 1)
            goals["cpu_" + name] = 1e6 * spent.cpu_s / max(calls, 1)
        self.write(kind="goals", **common, **goals)

    async def compare(self, concurrency: int) -> None:
        """Part two, at one load."""
        load = Load(self.llm, concurrency, SHAPES[self.options.shape]["vocab_size"], self.options.lengths)
        await asyncio.sleep(self.options.warm_up)
        periods: list[Period] = []
        for number in range(self.options.switches):
            on = number % 4 in (0, 3)  # on, off, off, on: a drift is on both sides
            await self.switch(on=on)
            await asyncio.sleep(SETTLE_S)
            load.meter, began, cpu_before = Meter(), time.perf_counter(), time.process_time()
            await asyncio.sleep(self.options.period - SETTLE_S)
            meter, seconds, cpu_s = load.meter, time.perf_counter() - began, time.process_time() - cpu_before
            load.check()
            p99_ms = 1000 * (percentile(meter.gaps, 0.99) or math.nan)
            tpot_ms, cpu_us = 1000 * (tpot(meter.gaps) or math.nan), 1e6 * cpu_s / meter.tokens
            periods.append(Period(on, meter.tokens / seconds, tpot_ms, p99_ms, cpu_us))
        await self.switch(on=True)
        await load.stop()
        for name in ("tokens_per_s", "tpot_ms", "itl_p99_ms", "api_cpu_us_a_token"):
            self.write(kind="ab", concurrency=concurrency, figure=name, **paired(periods, name))
        self.write(kind="ab_periods", concurrency=concurrency, periods=[asdict(p) for p in periods])


def paired(periods: list[Period], name: str) -> dict[str, Any]:
    """The mean of the pairs' differences, on against off, in percent, with its 95% interval."""
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


def write_model(folder: Path, shape: str) -> Path:
    """A Qwen2 of that shape: its configuration alone."""
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
    if not await bench.check_installed():
        raise SystemExit("a hook is not installed")
    await bench.core("sloguard_timed")
    for batch in bench.options.batches:
        await bench.time_hooks(batch, changed=False)
    # From here on a live change is in force, which hooks the scheduler: the most that the plugin ever does.
    await asyncio.to_thread(bench.ask_hub, f"seqs {bench.most_sequences + 1}")
    for batch in bench.options.changed_batches:
        await bench.time_hooks(batch, changed=True)
    for concurrency in bench.options.concurrency:
        await bench.compare(concurrency)


def numbers(text: str) -> list[int]:
    """ "1,64" as a list."""
    return [int(part) for part in text.split(",") if part]


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--batches", type=numbers, default=[1, 64, 256, 1000], help="batch sizes for the timed hooks")
    parser.add_argument("--changed-batches", type=numbers, default=[64, 1000], help="the same with a live change")
    parser.add_argument("--concurrency", type=numbers, default=[64, 256], help="loads for the comparison")
    parser.add_argument("--switches", type=int, default=80)
    parser.add_argument("--period", type=float, default=4.2, help="seconds between two switches")
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
            assert hub.stdout is not None
            hub.stdout.readline()
            bench = Bench(options, hub)
            try:
                bench.start(Path(name))
                asyncio.run(run(bench))
                time.sleep(2)
                ended, dropped, errors, gaps = map(int, bench.ask_hub("").split())
                bench.write(kind="telemetry", ended=ended, dropped=dropped, hook_errors=errors, gaps=gaps)
            finally:
                if bench.llm is not None:
                    bench.llm.shutdown()
                    bench.llm = None
                hub.kill()
    return 0 if errors == 0 and dropped == 0 else 1


if __name__ == "__mp_main__":  # the engine core's process, where vLLM spawns it
    install_core_timers()
if __name__ == "__main__":
    sys.exit(main())
