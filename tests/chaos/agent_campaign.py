#!/usr/bin/env python3
"""Faults between a sidecar and its agent at random moments of a window, on fake engines.

    python tests/chaos/agent_campaign.py --runs 20 --seed 0 --jobs 2

Each run has its own folder and ports. It opens a window, injects one fault, and waits for the service. Prints one
line per run and a summary; the exit code is 1 if an invariant was violated: within 30 s of the fault's end the service
is back or the window goes on, every recorded trial stays as it was, no trial counts as a crash because of the fault, no
engine is started while another one runs, and no sidecar has the agent again after another one had it.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from agent_faults import AGENT_FAULTS, LEASE_S, AgentRig, LeaseObserver, until
from agent_invariants import BACK_WITHIN_S, SETTLED_WITHIN_S, AgentRun, ObservedTrial, TrialKey, violations
from agent_process import AgentProcess, served_seqs
from service_process import SLOGUARD, at_agent, configured, state_of
from weak_link import WeakLink

from sidecar.config.schema import load_config

# About as long as a window of three trials.
_LATEST_STRIKE_S = 12.0


def run_agent_fault(seed: int, only: str = "") -> tuple[str, AgentRun]:
    """One run with the fault that ``seed`` chooses, or with ``only``."""
    rng = random.Random(seed)
    name = only or list(AGENT_FAULTS)[seed % len(AGENT_FAULTS)]
    with tempfile.TemporaryDirectory(prefix="agent-chaos-") as place:
        rig = _new_rig(Path(place))
        observer = LeaseObserver(rig.agent)
        try:
            return name, _struck(rig, name, rng, observer)
        finally:
            observer.close()
            rig.close()


def _new_rig(folder: Path) -> AgentRig:
    agent = AgentProcess(folder, FAKE_FOLDER=str(folder), FAKE_LOAD_S="1").start()
    link = WeakLink(folder / "link.sock", agent.socket)
    config_file = at_agent(configured(folder, budget=3), link.address, agent_lease_s=LEASE_S)
    config = load_config(config_file)
    rig = AgentRig(config_file, config, agent, link, subprocess.Popen(["true"]), config)
    rig.sidecar.wait()
    rig.restart_sidecar()
    if until(lambda: state_of(config) == "serving", 120.0) is None:
        rig.close()
        raise RuntimeError("the rig does not serve")
    return rig


def _struck(rig: AgentRig, name: str, rng: random.Random, observer: LeaseObserver) -> AgentRun:
    subprocess.run([*SLOGUARD, "retune", "--now", "-c", str(rig.config_file)], check=True, capture_output=True)
    time.sleep(rng.uniform(0, _LATEST_STRIKE_S))
    before = _observed(rig)
    struck = AGENT_FAULTS[name](rig, rng)
    done = _ended(rig)

    def settled() -> bool:
        return state_of(rig.current) == "serving" and bool(served_seqs(rig.port)) and rig.sidecar.poll() is None

    back_s = until(lambda: served_seqs(rig.port) or _ended(rig) > done, BACK_WITHIN_S)
    settled_s = until(settled, SETTLED_WITHIN_S)
    time.sleep(0.5)  # for the observer
    starts = (rig.agent.state.parent / "starts.jsonl").read_text().splitlines()
    return AgentRun(
        struck,
        before,
        _observed(rig),
        back_s,
        settled_s,
        [bool(json.loads(line)["free"]) for line in starts if line],
        tuple(observer.holders),
        rig.expected_holder,
        engine_killed=name == "engine killed",
    )


def _observed(rig: AgentRig) -> dict[TrialKey, ObservedTrial]:
    return {(trial.run, trial.number): ObservedTrial(trial.status, trial.result) for trial in rig.trials()}


def _ended(rig: AgentRig) -> int:
    return sum(trial.result is not None for trial in rig.trials())


def main() -> int:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", choices=["", *AGENT_FAULTS], help="this fault alone")
    options = parser.parse_args()
    bad, longest_s = 0, 0.0
    with ThreadPoolExecutor(options.jobs) as pool:
        seeds = range(options.seed, options.seed + options.runs)
        runs = pool.map(run_agent_fault, seeds, repeat(options.only))
        for seed, (name, run) in zip(seeds, runs, strict=True):
            wrong = violations(run)
            back = "not back" if run.back_s is None else f"back after {run.back_s:.1f} s"
            print(f"{seed}: {name}: {back}, {len(run.after)} trials: {'; '.join(wrong) or 'fine'}", flush=True)
            bad += bool(wrong)
            longest_s = max(longest_s, run.back_s or 0.0)
    print(
        f"{options.runs} runs, {bad} with a violated invariant; longest until the service was back: {longest_s:.1f} s"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
