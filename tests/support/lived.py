"""A sidecar that has been through it, scraped all the while: users, a window, a promotion, crashes, a rollback.

The engine is the fake one, which shows vLLM's own metrics by their names.
"""

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

from fake_service import fake_config, said_by, serving, sloguard, state_of
from prometheus_server import PrometheusServer

from sidecar.config.schema import Config, load_config
from sidecar.record.events import Operations, WindowOutcome
from sidecar.record.journal import Journal

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "alerts.yml"
OUT_OF_MEMORY, DIES = 13, 19
REQUESTS = 'sum(sloguard_requests_total{traffic="serving"})'
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Lived:
    """The Prometheus that scraped it, and the sidecar, which still runs."""

    prometheus: PrometheusServer
    config: Config
    began: float  # seconds since the epoch
    served_before: float  # requests of users before the engine crashed, by what does not serve any more

    def metrics(self) -> str:
        """The sidecar's current metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.config.metrics.port}/metrics", timeout=10) as answer:
            return answer.read().decode()


@contextmanager
def lived(folder: Path, *, users_s: float = 3.0, load_s: float = 0.1, budget: int = 4) -> Generator[Lived]:
    """The whole story. ``users_s`` is how long users are served before the window, after it and at the end."""
    config_file = _config(folder, budget)
    config = load_config(config_file)
    address = f"127.0.0.1:{config.metrics.port}"
    engine = f"127.0.0.1:{config.engine.port}"
    began = time.time()
    environment = {"FAKE_TELEMETRY": "whole", "FAKE_LOAD_S": str(load_s), "FAKE_START_S": str(load_s / 2)}
    with (
        PrometheusServer({"sloguard": address, "vllm": engine}, RULES) as prometheus,
        serving(config_file, **environment),
        _users(f"http://{engine}"),
    ):
        prometheus.wait_until_up()
        time.sleep(users_s)
        asked = sloguard("retune", "--now", "-c", config_file)
        assert asked.returncode == 0, asked.stderr
        ended = partial(_ended, config)
        _until(ended, "the window's end", within_s=_PATIENCE_S + 20 * budget * load_s)
        assert ended() == WindowOutcome.PROMOTED, said_by(config_file).read_text()
        time.sleep(users_s)
        prometheus.wait_until_up()
        (told,) = prometheus.query(REQUESTS)
        for _ in range(2):
            _crash(config.state)
        time.sleep(users_s)
        # The new engine counts from zero, and few of its requests are slow.
        missed = partial(prometheus.query, 'sloguard_slo_misses_total{objective="e2e"} > 0')
        _until(missed, "a request over its limit")
        prometheus.wait_until_up()
        yield Lived(prometheus, config, began, float(told["value"][1]))


def _config(folder: Path, budget: int) -> Path:
    return fake_config(
        folder,
        slo={"ttft_p99_ms": 3000, "itl_p99_ms": 60, "tpot_p99_ms": 60, "e2e_p99_ms": 1000, "error_rate": 0.01},
        search={
            "budget": budget,
            "knobs": {
                "max_num_seqs": {"low": 4, "high": 12},
                # Fewer than max_model_len without chunked prefill: each trial has something to repair.
                "max_num_batched_tokens": {"low": 128, "high": 256},
                "enable_chunked_prefill": {"choices": [False]},
            },
            "unguarded": [{"max_num_seqs": OUT_OF_MEMORY}, {"max_num_seqs": DIES}],
        },
        promotion={"pairs": [2], "probation": {"crashes": 2}},
        window={"duration": "10m", "notice": "0s", "cron": "0 3 1 1 *"},
    )


def _ended(config: Config) -> str:
    """The outcome of the window; empty before it has ended."""
    operations = Operations(Journal(config.state, read_only=True), config.base_digest())
    last = operations.last_window()
    return last.content["outcome"] if last is not None and state_of(config.state) == "serving" else ""


def _crash(state: Path) -> None:
    """Kills the serving engine and waits until the sidecar has started another."""
    journal = Journal(state, read_only=True)
    (engine,) = journal.engines()
    os.kill(engine.identity.pid, signal.SIGKILL)
    _until(lambda: journal.engines() not in ([], [engine]) and state_of(state) == "serving", "serving after a crash")


def _until(holds: Callable[[], object], what: str, within_s: float = _PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.1)


@contextmanager
def _users(url: str) -> Generator[None]:
    """Ten requests a second, one in eight of them slow; failures are retried."""
    ended = threading.Event()

    def use(first: int) -> None:
        number = first
        while not ended.wait(0.2):
            number += 1
            with suppress(OSError, HTTPException, ValueError):
                with urllib.request.urlopen(f"{url}/load", timeout=5) as answer:
                    seconds = 0.6 / json.loads(answer.read())["max_num_seqs"]
                body: dict[str, Any] = {"prompt": "a question" * 10, "max_tokens": 16}
                body["seconds"] = seconds * (4 if number % 8 == 0 else 1)
                request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
                with urllib.request.urlopen(request, timeout=10) as answer:
                    answer.read()

    threads = [threading.Thread(target=use, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(15)
