"""Starts the current configuration repeatedly and measures each start as a trial: the run-to-run spread.

    python benchmarks/starts.py -c deploy/demo/sloguard.yaml [--starts 8] [--arg name=value ...] >> FILE.jsonl

Run with a Python that has vLLM and this project. One JSON line per start: the measurement, and each request's E2E
latency in seconds, in sending order. `sloguard dev bench promotion` reads such a file.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import yaml

from sidecar.config.schema import load_config
from sidecar.metrics.exporter import Metrics
from sidecar.record.trial import RESULT, Plan, Role
from sidecar.run.judging import judged_result, load_schedule
from sidecar.service.wiring import assembled
from vllm_sloguard.agent.serve_command import Args


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-c", "--config", type=Path, required=True)
    parser.add_argument("--starts", type=int, default=8)
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="over the configuration's")
    given = parser.parse_args()
    changed = {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in given.arg)}
    for number in range(1, given.starts + 1):
        print(json.dumps({"start": number, **measured(given.config, changed)}), flush=True)


def measured(path: Path, changed: Args) -> dict[str, object]:
    """One start, with its own journal."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(path).model_copy(update={"state": Path(folder) / "state"})
        args = {**config.engine.args, **changed}
        plan = Plan(Role.REFERENCE, {}, args, "start", "the run-to-run spread")
        with assembled(config, _say, Metrics(config)) as parts:
            raw = parts.runner.run(plan, load_schedule(config, plan.role), lambda: False)
            result = judged_result(raw, plan.role, config)
    return {"args": args, **json.loads(RESULT.dump_json(result))}


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
