"""Measures the CPU time of the plugin's sending thread outside an engine, where other load disturbs it least.

    python benchmarks/sending_thread.py

vLLM's own records of steps are made up for batches of 1, 64, 256 and 1,000 requests of 128 tokens, at the step rates of
a 1.5B model on an H200, and handed to the plugin's stat logger. Its client digests them every second and sends them
every five, to a sidecar's telemetry service in another process. 40 seconds of each batch are processed twice, without
and with finished requests; the difference is the requests' share.
"""

import os
import subprocess
import sys
import tempfile
import time
import types
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

# Batch size, and steps per second.
BATCHES = ((1, 250), (64, 200), (256, 100), (1000, 25))
SECONDS, SEND_EVERY_S, TOKENS = 40, 5, 128
HUB = """
import sys
from pathlib import Path
from sidecar.observe.telemetry import TelemetryHub
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.wire.telemetry_pb2_grpc import add_TelemetryServiceServicer_to_server as add
hub = TelemetryHub()
hub.expect("cost")
server = serve_unix_socket(Path(sys.argv[1]), lambda server: add(hub, server))
print("up", flush=True)
sys.stdin.readline()
"""


class Records:
    """The records of an engine's steps, numbered through."""

    def __init__(self, logger: Any) -> None:
        self.logger, self.step, self._owed = logger, 0, 0.0

    def second(self, batch: int, steps: int, *, finish: bool) -> int:
        """Hands over a second of steps; how many requests finished in it."""
        from vllm.v1.metrics.stats import IterationStats, SchedulerStats

        finished = 0
        for _ in range(steps):
            self.step += 1
            iteration = IterationStats()
            iteration.num_generation_tokens = batch
            iteration.inter_token_latencies_iter = [0.01 + self.step * 1e-9 for _ in range(batch)]
            self._owed += batch / TOKENS if finish else 0.0
            while self._owed >= 1:
                iteration.finished_requests.append(self._request())
                self._owed, finished = self._owed - 1, finished + 1
            levels = SchedulerStats(num_running_reqs=batch)
            self.logger._pending.append((self.step, self.step * 0.01, levels, iteration))
        return finished

    def _request(self) -> Any:
        stats = types.SimpleNamespace(
            first_token_latency=0.2, sloguard_first_step=max(self.step - TOKENS, 0), sloguard_stalls=()
        )
        return types.SimpleNamespace(
            num_generation_tokens=TOKENS, decode_time=1.28, e2e_latency=1.5, queued_time=0.01, prefill_time=0.1,
            num_prompt_tokens=128, finish_reason="length", sloguard_stats=stats,
        )  # fmt: skip


def main() -> None:
    """Measures and prints a table."""
    with tempfile.TemporaryDirectory() as folder:
        socket, pipe = f"{folder}/s", subprocess.PIPE
        with subprocess.Popen([sys.executable, "-c", HUB, socket], stdin=pipe, stdout=pipe, text=True) as hub:
            assert hub.stdout is not None
            hub.stdout.readline()
            try:
                measure(socket)
            finally:
                hub.kill()


def measure(socket: str) -> None:
    """All batches."""
    from vllm_sloguard.hooks import plugin, stat_logger
    from vllm_sloguard.hooks.settings import Settings
    from vllm_sloguard.hooks.telemetry_client import TelemetryClient

    client = TelemetryClient(Settings(socket=socket, engine_id="cost"))
    plugin._link = client  # pyright: ignore[reportPrivateUsage]
    logger: Any = stat_logger.SloguardStatLogger(None, 0)  # pyright: ignore[reportArgumentType]
    logger._answered = True
    client.add_source(logger.digest, logger.totals)
    records = Records(logger)
    print("| batch | steps/s | a step, µs | a finished request, µs |\n| --- | --- | --- | --- |")
    for batch, rate in BATCHES:
        steps_s, _ = spent(client, records, batch, rate, finish=False)
        all_s, requests = spent(client, records, batch, rate, finish=True)
        step_us, request_us = 1e6 * steps_s / (rate * SECONDS), 1e6 * (all_s - steps_s) / max(requests, 1)
        print(f"| {batch} | {rate} | {step_us:.1f} | {request_us:.1f} |", flush=True)


def spent(client: Any, records: Records, batch: int, rate: int, *, finish: bool) -> tuple[float, int]:
    """CPU seconds of the thread, and requests."""
    seconds, requests = 0.0, 0
    for second in range(1, SECONDS + 1):
        requests += records.second(batch, rate, finish=finish)
        began = time.thread_time()
        client._tick(sends=second % SEND_EVERY_S == 0)
        seconds += time.thread_time() - began
    return seconds, requests


if __name__ == "__main__":
    main()
