"""What a trial costs more through an agent than without: the fake engine, in turn, local and through a Unix socket.

``python benchmarks/agent_overhead.py [--trials 20]`` times one start, one load and one stop, and prints the medians.
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
sys.path.insert(0, str(ROOT / "tests" / "support"))

from agent_process import agent_process  # noqa: E402 - tests/support is not installed
from service_process import at_agent, configured  # noqa: E402

from sidecar.config.schema import Config, load_config  # noqa: E402
from sidecar.measure.load_client import LoadClient  # noqa: E402
from sidecar.metrics.exporter import Metrics  # noqa: E402
from sidecar.run.engine_manager import EngineManager  # noqa: E402
from sidecar.service.wiring import assembled  # noqa: E402


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


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    count = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / kind for kind in ("local", "agent")]
        for folder in folders:
            folder.mkdir()
        with agent_process(folders[1]) as agent:
            local = load_config(configured(folders[0]))
            remote = load_config(at_agent(configured(folders[1]), agent.address))
            with parts(local) as ours, parts(remote) as theirs:
                times: tuple[list[float], list[float]] = ([], [])
                for _ in range(count + 1):
                    times[0].append(trial_s(local, *ours))
                    times[1].append(trial_s(remote, *theirs))
    medians = [statistics.median(one[1:]) * 1000 for one in times]  # the first starts the load client
    means = [statistics.mean(one[1:]) * 1000 for one in times]
    print(f"{count} trials each: local median {medians[0]:.0f} ms, mean {means[0]:.0f} ms")
    print(f"through the agent: median {medians[1]:.0f} ms, mean {means[1]:.0f} ms")
    print(f"difference of the medians: {medians[1] - medians[0]:+.0f} ms; of the means: {means[1] - means[0]:+.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
