"""Real vLLM with and without ``sloguard-agent --`` in front: time to the first token, and how signals end it.

``python benchmarks/agent_drop_in.py [--rounds 5] [--into FILE]`` starts the demo's model in turn without and with the
agent, and prints one JSON line per start and a summary.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from vllm_sloguard.agent.engine_http import EngineHttp, Unanswered
from vllm_sloguard.agent.ports import any_free_port
from vllm_sloguard.agent.serve_command import command_line

DEMO = Path(__file__).resolve().parents[1] / "deploy" / "demo"
_LONGEST_S = 300.0
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class DropInStart:
    """One start: seconds to the first token, then the exit code after the signal, and how long that took."""

    agent: bool
    round: int
    ready_s: float
    signal: str
    exit_code: int
    exit_s: float


def start(agent: bool, number: int, kind: signal.Signals, folder: Path) -> DropInStart:
    """Starts vLLM, waits for its first token, and ends it with ``kind``."""
    args = yaml.safe_load((DEMO / "sloguard.yaml").read_text(encoding="utf-8"))["engine"]["args"]
    port = any_free_port()
    command = command_line(sys.executable, str(DEMO / "model"), {**args, "host": "127.0.0.1", "port": port})
    if agent:
        state = str(folder / f"agent-{number}")
        command = [sys.executable, "-m", "vllm_sloguard.agent", "--state", state, "--", *command]
    began = time.monotonic()
    with (folder / f"{number}-{agent}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **_ENVIRONMENT})
    http = EngineHttp("127.0.0.1", port)
    while True:
        if process.poll() is not None or time.monotonic() - began > _LONGEST_S:
            process.kill()
            sys.exit(f"it did not start: {Path(log.name).read_text(errors='replace')[-2000:]}")
        try:
            if http.healthy():
                http.complete("a", 1, 30)
                break
        except Unanswered:
            pass
        time.sleep(0.05)
    ready_s = time.monotonic() - began
    began = time.monotonic()
    process.send_signal(kind)
    code = process.wait(120)
    return DropInStart(agent, number, ready_s, kind.name, code, time.monotonic() - began)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    starts: list[DropInStart] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            kind = signal.SIGINT if number % 2 else signal.SIGTERM
            # The first of a round has a colder page cache, so they take turns.
            for agent in (False, True) if number % 2 == 0 else (True, False):
                starts.append(start(agent, number, kind, Path(folder)))
                print(json.dumps(asdict(starts[-1])), flush=True)
    for agent in (False, True):
        times = [one.ready_s for one in starts if one.agent is agent]
        mean, spread = statistics.mean(times), statistics.stdev(times) if len(times) > 1 else 0.0
        which = "with" if agent else "without"
        print(f"{which} the agent: first token after {mean:.2f} s, standard deviation {spread:.2f} s")
    if options.into is not None:
        options.into.write_text("".join(json.dumps(asdict(one)) + "\n" for one in starts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
