"""Records and reads loads request by request, as seen by their client.

    python benchmarks/recorded_loads.py cpu|model FILE

``cpu`` is vLLM's CPU build with the demo's model, started twice, under open-loop loads at rising rates; ``model`` is
the discrete-event engine of benchmarks/landscapes/engine_model.py with the speed of an 8B model on an A100. Each line
of the file is one load and its SLO. Times are in units of 0.1 ms.
"""

import argparse
import json
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sidecar.config.schema import Config, Workload, load_config
from sidecar.config.slo import Slo
from sidecar.engine.engine import Engine, Launch
from sidecar.measure.load_client import LoadClient
from sidecar.measure.requests import RequestResult
from vllm_sloguard.agent.ports import any_free_port

_ROOT = Path(__file__).resolve().parents[1]
_UNITS = 10_000  # of a second
_SLOS = (
    {"ttft_p99_ms": 500.0, "e2e_p99_ms": 2000.0},
    {"ttft_p99_ms": 2000.0, "itl_p99_ms": 60.0, "e2e_p99_ms": 3000.0},
)
_MODEL_SLOS = ({"ttft_p99_ms": 900.0}, {"e2e_p99_ms": 15_000.0}, {"ttft_p99_ms": 3000.0, "e2e_p99_ms": 30_000.0})


@dataclass(frozen=True)
class Recorded:
    """One complete load, and its SLO."""

    name: str
    source: str
    slo: Slo
    workload: Workload
    requests: tuple[RequestResult, ...]


def read(path: Path) -> list[Recorded]:
    """The loads of ``path``."""
    return [_loaded(json.loads(line)) for line in path.read_text().splitlines()]


def _loaded(row: dict[str, Any]) -> Recorded:
    requests = tuple(
        RequestResult(
            None if error else ttft / _UNITS,
            None if error else e2e / _UNITS,
            tuple(itl / _UNITS for itl in itls),
            error,
            start / _UNITS,
        )
        for start, ttft, e2e, itls, error in row["requests"]
    )
    return Recorded(row["name"], row["source"], Slo(**row["slo"]), Workload(**row["workload"]), requests)


def _row(recorded: Recorded) -> dict[str, Any]:
    first = min(r.start_s or 0.0 for r in recorded.requests)
    requests = [
        [_units((r.start_s or 0.0) - first), _units(r.ttft_s), _units(r.e2e_s), [_units(i) for i in r.itls_s], r.error]
        for r in recorded.requests
    ]
    return {
        "name": recorded.name,
        "source": recorded.source,
        "slo": recorded.slo.model_dump(exclude_none=True),
        "workload": recorded.workload.model_dump(exclude_unset=True),
        "requests": requests,
    }


def _units(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * _UNITS)


def from_cpu() -> Iterator[Recorded]:
    """Real vLLM, with few and with many concurrent sequences."""
    config = load_config(_ROOT / "deploy" / "demo" / "sloguard.yaml")
    rates = {2: (4, 6, 8, 10, 14, 20, 30), 32: (4, 8, 12, 16, 24, 40, 60)}
    with tempfile.TemporaryDirectory() as folder:
        client = LoadClient(config.engine.python, Path(folder) / "client.log", config.engine.env)
        client.start()
        for seqs, rising in rates.items():
            engine = _started(config, seqs, Path(folder) / f"engine-{seqs}.log")
            model = engine.http.model()
            for seed, rate in enumerate(rising * 2):
                # A load of about ten seconds.
                changes = {"rate": float(rate), "requests": min(max(60, 10 * rate), 300), "seed": seed}
                workload = config.workload.model_copy(update=changes)
                sent = client.run(workload, engine.http.base_url, model, config.model, lambda: False)
                name = f"{seqs} sequences, {rate} requests/s, seed {seed}"
                slo = Slo(**_SLOS[seed % len(_SLOS)])
                yield Recorded(name, "vLLM 0.32, CPU, the demo's model", slo, workload, sent.requests)
            engine.stop()
        client.close()


def _started(config: Config, seqs: int, log: Path) -> Engine:
    args = {**config.engine.args, "max_num_seqs": seqs}
    port = any_free_port()
    launch = Launch(
        uuid.uuid4().hex[:12], config.engine.python, config.model, args, "127.0.0.1", port, config.engine.env, log
    )
    engine = Engine.start(launch)
    engine.wait_ready(config.engine.start_timeout_s, lambda: False)
    return engine


def from_model() -> Iterator[Recorded]:
    """The engine model, which gives no single gaps between tokens, at rates below and above its capacity."""
    # It lies next to this file, outside the import path of readers.
    sys.path.append(str(Path(__file__).parent / "landscapes"))
    from crash_rich import A100, LLAMA_8B
    from engine_model import Load, Settings, serve
    from shared_card import speed_of

    places = [(seqs, rate) for rate in (2.0, 3.0, 4.0, 4.5, 5.0, 5.5, 6.0, 8.0, 10.0, 12.0) for seqs in (16, 48, 192)]
    for seed, (seqs, rate) in enumerate(places * 2):
        plan = Load(rate, 240, 800, 150, 0.4, 0.4, 4000, jitter_ms=0.0, seed=seed)
        settings = Settings(seqs, 2048, 60_000.0, 4000)
        served = serve(plan, settings, speed_of(LLAMA_8B, A100), np.random.default_rng(seed))
        arrivals_s = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, plan.requests))  # as the model draws
        assert len(served.ttft_ms) == plan.requests
        requests = tuple(
            RequestResult(ttft / 1000, e2e / 1000, (), "", start)
            for start, ttft, e2e in zip(arrivals_s, served.ttft_ms, served.e2e_ms, strict=True)
        )
        name = f"{seqs} sequences, {rate:g} requests/s, seed {seed}"
        workload = Workload(rate=rate, requests=plan.requests, input_tokens=800, output_tokens=150, spread=0.9)
        slo = Slo(**_MODEL_SLOS[seed % len(_MODEL_SLOS)])
        yield Recorded(name, "engine model: 8B on an A100", slo, workload, requests)


def main() -> None:
    """Appends to the file load by load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=("cpu", "model"))
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    for recorded in {"cpu": from_cpu, "model": from_model}[given.source]():
        with given.file.open("a") as file:
            file.write(json.dumps(_row(recorded), separators=(",", ":")) + "\n")
        print(recorded.name, flush=True)


if __name__ == "__main__":
    main()
