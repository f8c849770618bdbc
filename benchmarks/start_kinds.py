"""Times one start of each kind, ordinary and forked: to the first token, or to the failure.

    python benchmarks/start_kinds.py -c CONFIG [--ways ordinary forked] [--only KIND ...] >> FILE.jsonl

Run with a Python that has vLLM and this project. Each way has its own caches (vLLM's, Triton's), empty at first, so
that neither benefits from the other's compilation. One JSON object per start: way, kind, overrides of CONFIG's
arguments, seconds, and the crash if there was one. ``imports`` is the start of the fork server with a first engine,
which teaches it what to import; it exists for the forked way only.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sidecar.bench.engine_starts import start
from sidecar.config.schema import Config, load_config
from sidecar.engine.engine import EngineCrashed
from vllm_sloguard.agent.fork_client import ForkServer

ORDINARY, FORKED = WAYS = "ordinary", "forked"
EAGER: Mapping[str, Any] = {"enforce-eager": True}
# The order matters: later starts use the caches of earlier ones.
KINDS: Mapping[str, Mapping[str, Any]] = {
    "eager": EAGER,
    "eager again": EAGER,
    "refused": {**EAGER, "max-num-batched-tokens": 64, "max-num-seqs": 128},  # vLLM: tokens must cover the sequences
    "out of memory": {**EAGER, "gpu-memory-utilization": 0.01},
    "compiled first": {},
    "compiled again": {},
    "other settings": {"max-num-seqs": 128, "max-num-batched-tokens": 4096},
}


def main() -> None:
    """Starts and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=[*KINDS], metavar="KIND", help=", ".join(KINDS))
    given = parser.parse_args()
    config = load_config(given.config)
    for way in given.ways:
        with tempfile.TemporaryDirectory(prefix="sloguard-starts-") as folder:
            starts(config, way, [kind for kind in KINDS if kind in given.only], Path(folder))


def starts(config: Config, way: str, kinds: list[str], folder: Path) -> None:
    """Prints one line per start."""
    caches = {"VLLM_CACHE_ROOT": str(folder / "vllm"), "TRITON_CACHE_DIR": str(folder / "triton")}
    env = {**config.engine.env, **caches, "SLOGUARD_REPAIR": "off"}
    server = None
    if way == FORKED:
        server = ForkServer(config.engine.python, {**os.environ, **env}, folder, folder / "fork-server.log")
    try:
        if server is not None:
            _print(way, "imports", EAGER, _timed(config, EAGER, env, folder, server))
        for kind in kinds:
            _print(way, kind, KINDS[kind], _timed(config, KINDS[kind], env, folder, server))
    finally:
        if server is not None:
            server.close()


def _timed(
    config: Config, changes: Mapping[str, Any], env: dict[str, str], folder: Path, server: ForkServer | None
) -> dict[str, Any]:
    engine = config.engine.model_copy(update={"args": {**config.engine.args, **changes}, "env": env})
    began = time.monotonic()
    try:
        return {"seconds": start(config.model_copy(update={"engine": engine}), folder, server).seconds, "crash": None}
    except EngineCrashed as crashed:
        return {"seconds": time.monotonic() - began, "crash": asdict(crashed.crash)}


def _print(way: str, kind: str, changes: Mapping[str, Any], ended: Mapping[str, Any]) -> None:
    print(json.dumps({"way": way, "kind": kind, "changes": changes, **ended}), flush=True)
    print(f"{way}, {kind}: {ended['seconds']:.2f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
