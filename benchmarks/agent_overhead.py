"""How much longer a trial takes through an agent than without: the fake engine, alternating, over a Unix socket.

``python benchmarks/agent_overhead.py [--trials 40]`` times a start, a load and a stop in pairs, and prints the median
of the pairs' differences with its 95% interval. The goal is at most 20 ms.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("support", "chaos")]

import yaml  # noqa: E402 - tests/support is not installed
from agent_process import agent_process  # noqa: E402 - tests/support is not installed
from service_process import at_agent, configured  # noqa: E402

from sidecar.config.schema import Config, load_config  # noqa: E402
from sidecar.measure.load_client import LoadClient  # noqa: E402
from sidecar.metrics.exporter import Metrics  # noqa: E402
from sidecar.run.engine_manager import EngineManager  # noqa: E402
from sidecar.service.wiring import assembled  # noqa: E402
from vllm_sloguard.latency import percentile_interval  # noqa: E402


@contextmanager
def parts(config: Config) -> Generator[tuple[EngineManager, LoadClient]]:
    """The engines and the load client of a sidecar."""
    with assembled(config, print, Metrics(config)) as wired:
        wired.runner.act_for(wired.journal.take_over(1))
        yield wired.engines, wired.runner.client


def trial_s(config: Config, engines: EngineManager, client: LoadClient) -> float:
    """Seconds for one start up to the first token, one load, and the stop."""
    began = time.monotonic()
    launch = engines.trial_launch({"max_num_seqs": 8, "max_model_len": 512}, repair=False)
    engine, _ = engines.begin(launch, "trial", fork=False)
    engine.wait_ready(60, bool)
    client.run(config.workload, engine.http.base_url, engine.http.model(), config.model, bool)
    engine.probe(10)
    engines.end(engine, drain=False)
    return time.monotonic() - began


def _without_agent(path: Path) -> Path:
    content = yaml.safe_load(path.read_text())
    content["engine"]["agents"] = []
    path.write_text(yaml.safe_dump(content))
    return path


Setup = tuple[Config, EngineManager, LoadClient]


def _pair(number: int, local: Setup, remote: Setup) -> tuple[float, float]:
    """Seconds for a trial without and with the agent; which is first alternates."""
    if number % 2:
        remote_s = trial_s(*remote)
        return trial_s(*local), remote_s
    return trial_s(*local), trial_s(*remote)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=40)
    count = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / kind for kind in ("local", "agent")]
        for folder in folders:
            folder.mkdir()
        with agent_process(folders[1]) as agent:
            local = load_config(_without_agent(configured(folders[0])))
            remote = load_config(at_agent(configured(folders[1]), agent.address))
            with parts(local) as ours, parts(remote) as theirs:
                pairs = [_pair(number, (local, *ours), (remote, *theirs)) for number in range(count + 1)]
    differences = [remote_s - local_s for local_s, remote_s in pairs[1:]]  # the first pair starts the load clients
    median = percentile_interval(differences, 0.5)
    assert median is not None
    for name, times in (("without", [pair[0] for pair in pairs[1:]]), ("through the agent", [p[1] for p in pairs[1:]])):
        print(f"{name}: median {statistics.median(times) * 1000:.0f} ms, mean {statistics.mean(times) * 1000:.0f} ms")
    print(
        f"difference of {count} pairs: median {median.value * 1000:+.0f} ms (95%: {median.low * 1000:+.0f} to"
        f" {median.high * 1000:+.0f} ms), mean {statistics.mean(differences) * 1000:+.0f} ms"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
