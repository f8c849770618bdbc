"""One start of each kind, ordinary and forked: to the first token, or to the failure.

    python benchmarks/start_kinds.py -c CONFIG [--ways ordinary,forked] [--only NAME,NAME] >> FILE.jsonl

Run by a Python that has vLLM and this project. Each way has caches of its own (vLLM's, Triton's), empty at first, so
that neither finds what the other compiled. A JSON object a start: way, kind, what it changes of CONFIG's arguments,
seconds, and the crash if it was one. ``imports`` is the start of the fork server and a first engine, which teaches it
what to import; it is there for the forked way alone.
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

from sidecar.config import Config, load
from sidecar.engine.engine import Engine, EngineCrashed, Launch, any_free_port
from sidecar.engine.fork_server import ForkServer

ORDINARY, FORKED = "ordinary", "forked"
EAGER: Mapping[str, Any] = {"enforce-eager": True}
# In this order: what comes later finds the caches of what came before.
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
    parser.add_argument("--ways", default=f"{ORDINARY},{FORKED}")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds")
    given = parser.parse_args()
    config = load(given.config)
    for way in given.ways.split(","):
        with tempfile.TemporaryDirectory(prefix="sloguard-starts-") as folder:
            starts(config, way, [kind for kind in KINDS if kind in given.only.split(",")], Path(folder))


def starts(config: Config, way: str, kinds: list[str], folder: Path) -> None:
    """Prints a line a start."""
    caches = {"VLLM_CACHE_ROOT": str(folder / "vllm"), "TRITON_CACHE_DIR": str(folder / "triton")}
    env = {**config.engine.env, **caches, "SLOGUARD_IMPORTS": str(folder), "SLOGUARD_REPAIR": "off"}
    server = None
    if way == FORKED:
        server = ForkServer(config.engine.python, {**os.environ, **env}, folder, folder / "fork-server.log")
    try:
        if server is not None:
            _print(way, "imports", EAGER, _start(config, EAGER, env, folder, server))
        for kind in kinds:
            _print(way, kind, KINDS[kind], _start(config, KINDS[kind], env, folder, server))
    finally:
        if server is not None:
            server.close()


def _start(
    config: Config, changes: Mapping[str, Any], env: Mapping[str, str], folder: Path, server: ForkServer | None
) -> dict[str, Any]:
    engine_id = os.urandom(6).hex()
    args = {**config.engine.args, **changes}
    log = folder / f"{engine_id}.log"
    launch = Launch(engine_id, config.engine.python, config.model, args, "127.0.0.1", any_free_port(), dict(env), log)
    crash = None
    began = time.monotonic()
    engine = Engine.start(launch, server)
    try:
        engine.wait_ready(config.engine.start_timeout_s, lambda: False)
    except EngineCrashed as crashed:
        crash = asdict(crashed.crash)
    finally:
        seconds = time.monotonic() - began
        engine.group.kill()
    return {"seconds": seconds, "crash": crash}


def _print(way: str, kind: str, changes: Mapping[str, Any], ended: Mapping[str, Any]) -> None:
    print(json.dumps({"way": way, "kind": kind, "changes": changes, **ended}), flush=True)
    print(f"{way}, {kind}: {ended['seconds']:.2f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
