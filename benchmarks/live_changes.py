"""Random live changes under continuous load, one after another, on vLLM's CPU build with the demo's model.

Run with a Python that has vLLM and this project:

    python benchmarks/live_changes.py [--changes N] [--seed N] [--json]

Every change draws all live knobs at random, down to 2 requests and 32 tokens per step. It is verified once each engine
core has shown every knob, or obeyed it if the load cannot distinguish old from new (see vllm_sloguard/live_knobs.py).
The time is from the call to its verdict, both as seen by the sidecar. Exits with 1 if a request failed, the engine
died, or a change was not verified within 2 s.
"""

import argparse
import http.client
import json
import math
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

import grpc
import yaml

from sidecar.engine.engine import Engine, Launch
from sidecar.engine.live_knobs import Capabilities, LiveError, LiveHub
from sidecar.observe.telemetry import TelemetryHub
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.agent.ports import any_free_port
from vllm_sloguard.live_knobs import LONG_PREFILL, PREFIX_CACHING, RESERVE, SEQS, TOKENS, LiveVerdict
from vllm_sloguard.wire.live_pb2_grpc import add_LiveServiceServicer_to_server
from vllm_sloguard.wire.telemetry_pb2_grpc import add_TelemetryServiceServicer_to_server

DEMO = Path(__file__).resolve().parents[1] / "deploy" / "demo"
WITHIN_S = 2.0
_CLIENTS = 24
_SEQS = 16
_TOKENS = 1024
_LONGEST_PROMPT = 200
_LONGEST_ANSWER = 24
_LOWEST = {SEQS: 2, TOKENS: 32}
_START_TIMEOUT_S = 400.0
_REQUEST_TIMEOUT_S = 120.0


class Load:
    """Closed-loop clients: each sends its next request once the last one is answered."""

    def __init__(self, engine: Engine, clients: int = _CLIENTS, seed: int = 1) -> None:
        self._engine = engine
        self._model = engine.http.model()
        self._seed = seed
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.finished = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _client(self, number: int) -> None:
        draw = random.Random(self._seed * 1000 + number)  # noqa: S311 - no secret
        while not self._over.is_set():
            prompt = "".join(draw.choices("abcdefgh ", k=draw.randint(8, _LONGEST_PROMPT)))
            failure = complete(self._engine, self._model, prompt, draw.randint(4, _LONGEST_ANSWER))
            with self._lock:
                self.finished += not failure
                if failure:
                    self.failures.append(failure)
            if failure:
                time.sleep(0.1)


def complete(engine: Engine, model: str, prompt: str, output_tokens: int) -> str:
    """Requests ``output_tokens``; returns the problem with the response, empty if there is none."""
    body = {"model": model, "prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True, "temperature": 0}
    connection = http.client.HTTPConnection(engine.launch.host, engine.launch.port, timeout=_REQUEST_TIMEOUT_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = json.loads(answer.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    if answer.status != 200:
        return f"status {answer.status}: {content}"
    tokens, reason = content["usage"]["completion_tokens"], content["choices"][0]["finish_reason"]
    return "" if (tokens, reason) == (output_tokens, "length") else f"{tokens} of {output_tokens} tokens, {reason}"


def serve_live(hub: LiveHub, socket: Path) -> grpc.Server:
    """A sidecar socket on which ``hub`` serves the engine "live"."""
    telemetry = TelemetryHub()
    hub.expect("live")
    telemetry.expect("live")

    def register(server: grpc.Server) -> None:
        add_TelemetryServiceServicer_to_server(telemetry, server)
        add_LiveServiceServicer_to_server(hub, server)

    return serve_unix_socket(socket, register)


@dataclass(frozen=True)
class LiveEngine:
    """An engine, and the sidecar's side of its live changes."""

    engine: Engine
    hub: LiveHub
    server: grpc.Server


@contextmanager
def live_engine(folder: Path) -> Generator[LiveEngine]:
    """The demo's engine with headroom for live changes; its socket is ``folder``/s."""
    demo = yaml.safe_load((DEMO / "sloguard.yaml").read_text())["engine"]
    hub = LiveHub(epoch=1)
    server = serve_live(hub, folder / "s")
    args = {**demo["args"], "max-num-seqs": _SEQS, "max-num-batched-tokens": _TOKENS}
    env = {**demo["env"], "SLOGUARD_SOCKET": str(folder / "s"), "SLOGUARD_ENGINE_ID": "live"}
    port, log = any_free_port(), folder / "engine.log"
    launch = Launch("live", sys.executable, str(DEMO / "model"), args, "127.0.0.1", port, env, log)
    engine = Engine.start(launch)
    try:
        engine.wait_ready(_START_TIMEOUT_S, lambda: False)
        yield LiveEngine(engine, hub, server)
    finally:
        engine.group.kill()
        hub.close()
        server.stop(0).wait()


def random_targets(draw: random.Random, able: Capabilities) -> dict[str, int]:
    """A value per live knob; sizes on a logarithmic scale, up to the ceiling."""
    targets: dict[str, int] = {}
    for name, allowed in able.ranges.items():
        if name in _LOWEST:
            targets[name] = round(math.exp(draw.uniform(math.log(_LOWEST[name]), math.log(allowed.highest))))
        elif name == LONG_PREFILL:
            targets[name] = draw.choice((0, draw.randint(16, _LONGEST_PROMPT)))
        else:
            targets[name] = draw.randint(0, 1)
    return targets


@dataclass
class Outcome:
    """The results of a series of changes; times in milliseconds from call to verdict, as seen by the sidecar."""

    changes: int
    failed_requests: int = 0
    finished_requests: int = 0
    verified_in_time: int = 0
    verdict_ms: list[float] = field(default_factory=list[float])
    core_ms: list[float] = field(default_factory=list[float])
    shown: Counter[str] = field(default_factory=Counter[str])
    obeyed: Counter[str] = field(default_factory=Counter[str])
    problems: list[str] = field(default_factory=list[str])

    def passed(self) -> bool:
        """Whether no request failed and every change was verified in time."""
        return not self.failed_requests and not self.problems and self.verified_in_time == self.changes


def change_at_random(live: LiveEngine, changes: int, seed: int, within_s: float = WITHIN_S) -> Outcome:
    """Makes the changes under continuous load; each must be verified within ``within_s`` seconds."""
    engine, hub = live.engine, live.hub
    able = hub.capabilities("live", 10)
    assert set(able.ranges) == {SEQS, TOKENS, LONG_PREFILL, PREFIX_CACHING, RESERVE}, able.cold
    outcome = Outcome(changes)
    draw = random.Random(seed)  # noqa: S311 - no secret
    with Load(engine, seed=seed) as load:
        time.sleep(1)
        for number in range(changes):
            targets = random_targets(draw, able)
            try:
                _one_change(hub, targets, outcome, within_s)
            except LiveError as error:
                outcome.problems.append(f"change {number}, {targets}: {error}")
            if not engine.alive():
                outcome.problems.append(f"the engine died at change {number}, {targets}")
                break
            time.sleep(draw.uniform(0, 0.2))
    outcome.failed_requests, outcome.finished_requests = len(load.failures), load.finished
    outcome.problems += load.failures[:3]
    return outcome


def _one_change(hub: LiveHub, targets: dict[str, int], outcome: Outcome, within_s: float) -> None:
    began = time.monotonic()
    hub.change("live", targets, within_s)
    effects = hub.verified("live", within_s - (time.monotonic() - began))
    took_ms = (time.monotonic() - began) * 1000
    if not effects.verified():
        open_ = [f"{n} {k.before} → {k.target}" for n, k in effects.knobs.items() if k.verdict is LiveVerdict.OPEN]
        outcome.problems.append(f"not verified in {within_s:g} s: {', '.join(open_) or 'no step'} of {targets}")
        return
    outcome.verified_in_time += 1
    outcome.verdict_ms.append(took_ms)
    outcome.core_ms.append(max((k.seconds or 0.0 for k in effects.knobs.values()), default=0.0) * 1000)
    for name, knob in effects.knobs.items():
        (outcome.shown if knob.verdict is LiveVerdict.SHOWN else outcome.obeyed)[name] += 1


def quantiles(values: list[float]) -> str:
    """p50, p99 and the largest."""
    ordered = sorted(values) or [math.nan]
    p50, p99 = (ordered[min(math.ceil(len(ordered) * share), len(ordered)) - 1] for share in (0.50, 0.99))
    return f"p50 {p50:.1f}, p99 {p99:.1f}, max {ordered[-1]:.1f} ms"


def report(outcome: Outcome) -> str:
    """The result in a few lines."""
    share = outcome.verified_in_time / outcome.changes
    lines = [
        f"{outcome.changes} live changes under load: {outcome.finished_requests} requests finished,"
        f" {outcome.failed_requests} failed",
        f"verified in time: {outcome.verified_in_time} ({share:.1%});"
        f" call to verdict {quantiles(outcome.verdict_ms)};"
        f" receipt to verdict inside the engine {quantiles(outcome.core_ms)}",
    ]
    for name in sorted({*outcome.shown, *outcome.obeyed}):
        lines.append(f"  {name}: {outcome.shown[name]} shown, {outcome.obeyed[name]} obeyed")
    return "\n".join([*lines, *outcome.problems])


def main() -> int:
    """Runs the changes and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, live_engine(Path(folder)) as live:
        outcome = change_at_random(live, options.changes, options.seed)
    print(json.dumps(asdict(outcome)) if options.json else report(outcome))
    return 0 if outcome.passed() else 1


if __name__ == "__main__":
    sys.exit(main())
