#!/usr/bin/env python3
"""Faults between a sidecar and its agent at random moments of a window, on fake engines.

    python tests/chaos/agent_campaign.py --runs 20 --seed 0 --jobs 2

Each run has its own folder and ports. It opens a window, injects one fault, and waits for the service. Prints one
line per run and a summary; the exit code is 1 if an invariant was violated: within 30 s of the fault's end the service
is back or the window goes on, every recorded trial stays, no trial counts as a crash because of the fault, and no
engine is started while another one runs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from agent_process import AgentProcess, served_seqs
from service_process import SLOGUARD, at_agent, configured, started, state_of
from weak_link import LinkState, WeakLink

from sidecar.config.schema import Config, load_config
from sidecar.record.journal import Journal, JournalError
from sidecar.record.trial import Trial, TrialStatus

BACK_S = 30.0
_SETTLED_S = 150.0


@dataclass
class AgentRig:
    """One sidecar with its agent."""

    config_file: Path
    config: Config
    agent: AgentProcess
    link: WeakLink
    sidecar: "subprocess.Popen[str]"

    def restart_sidecar(self) -> None:
        self.sidecar = subprocess.Popen(
            [*SLOGUARD, "serve", "-c", str(self.config_file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def trials(self) -> list[Trial]:
        try:
            return Journal(self.config.state, read_only=True).trials()
        except JournalError:
            return []


def _sidecar_killed(rig: AgentRig, rng: random.Random) -> None:
    rig.sidecar.kill()
    rig.sidecar.communicate()
    time.sleep(rng.uniform(0, 1))
    rig.restart_sidecar()


def _sidecar_gone(rig: AgentRig, _rng: random.Random) -> None:
    rig.sidecar.kill()
    rig.sidecar.communicate()
    _until(lambda: served_seqs(rig.config.engine.port), BACK_S)
    rig.restart_sidecar()


def _agent_killed(rig: AgentRig, rng: random.Random) -> None:
    rig.agent.end(signal.SIGKILL)
    time.sleep(rng.uniform(0, 1))
    rig.agent.start()


def _engine_killed(rig: AgentRig, _rng: random.Random) -> None:
    for pid in rig.agent.engine_pids()[:1]:
        os.kill(pid, signal.SIGKILL)


def _link(state: LinkState) -> Callable[[AgentRig, random.Random], None]:
    def strike(rig: AgentRig, rng: random.Random) -> None:
        rig.link.become(state)
        time.sleep(rng.choice((1.0, 14.0)))  # within the lease, and beyond it
        rig.link.become(LinkState.WHOLE)

    return strike


def _link_slow(rig: AgentRig, _rng: random.Random) -> None:
    rig.link.delay_s = 2.0
    time.sleep(10)
    rig.link.delay_s = 0.0


def _frozen(rig: AgentRig, _rng: random.Random) -> None:
    pids = [*rig.agent.engine_pids(), rig.agent.pid]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        if number is signal.SIGSTOP:
            time.sleep(30)


def _stale(rig: AgentRig, _rng: random.Random) -> None:
    rig.sidecar.send_signal(signal.SIGSTOP)
    time.sleep(14)
    rig.sidecar.send_signal(signal.SIGCONT)


FAULTS: dict[str, Callable[[AgentRig, random.Random], None]] = {
    "sidecar killed": _sidecar_killed,
    "sidecar gone": _sidecar_gone,
    "agent killed": _agent_killed,
    "engine killed": _engine_killed,
    "link cut": _link(LinkState.CUT),
    "link silent": _link(LinkState.SILENT),
    "link half-closed": _link(LinkState.HALF_CLOSED),
    "link slow": _link_slow,
    "host frozen": _frozen,
    "stale sidecar": _stale,
}


def _until(holds: Callable[[], object], within_s: float) -> float | None:
    """Seconds until ``holds``; None if it never does."""
    began = time.monotonic()
    while time.monotonic() - began < within_s:
        if holds():
            return time.monotonic() - began
        time.sleep(0.1)
    return None


def run_agent_fault(seed: int) -> tuple[str, list[str], float]:
    """One run: the fault, what was wrong, and the seconds from its end until the service was back."""
    rng = random.Random(seed)
    name = list(FAULTS)[seed % len(FAULTS)]
    with tempfile.TemporaryDirectory(prefix="agent-chaos-") as place:
        folder = Path(place)
        agent = AgentProcess(folder, FAKE_FOLDER=place, FAKE_LOAD_S="1").start()
        link = WeakLink(folder / "link.sock", agent.socket)
        config_file = at_agent(configured(folder, budget=3), link.address)
        rig = AgentRig(config_file, load_config(config_file), agent, link, started(config_file))
        try:
            return name, *_struck(rig, name, rng)
        finally:
            rig.sidecar.kill()
            rig.sidecar.communicate()
            agent.clean_up()
            link.close()


def _struck(rig: AgentRig, name: str, rng: random.Random) -> tuple[list[str], float]:
    wrong: list[str] = []
    port = rig.config.engine.port
    subprocess.run([*SLOGUARD, "retune", "--now", "-c", str(rig.config_file)], check=True, capture_output=True)
    time.sleep(rng.uniform(0, 12))
    before = {(trial.run, trial.number): trial for trial in rig.trials()}
    FAULTS[name](rig, rng)
    ended = time.monotonic()
    done = len(_finished(rig))

    def settled() -> bool:
        return state_of(rig.config) == "serving" and bool(served_seqs(port)) and rig.sidecar.poll() is None

    back = _until(lambda: served_seqs(port) or len(_finished(rig)) > done, BACK_S)
    if back is None:
        wrong.append(f"{BACK_S:.0f} s after the fault nothing served, and no trial had ended")
    if _until(settled, _SETTLED_S) is None:
        wrong.append(f"not serving {_SETTLED_S:.0f} s after the fault: {state_of(rig.config)}")
    after = {(trial.run, trial.number): trial for trial in rig.trials()}
    wrong += [f"trial {key} is lost" for key in before if key not in after]
    wrong += [f"trial {key} still runs" for key, trial in after.items() if trial.status is TrialStatus.RUNNING]
    if name != "engine killed":
        wrong += [
            f"trial {key} counts as a crash" for key, trial in after.items() if trial.status is TrialStatus.CRASHED
        ]
    starts = [json.loads(line) for line in (rig.agent.state.parent / "starts.jsonl").read_text().split("\n") if line]
    wrong += [f"an engine was started beside another: {start}" for start in starts if not start["free"]]
    return wrong, (back if back is not None else time.monotonic() - ended)


def _finished(rig: AgentRig) -> list[Trial]:
    return [trial for trial in rig.trials() if trial.result is not None]


def main() -> int:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    bad = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        seeds = range(options.seed, options.seed + options.runs)
        for seed, (name, wrong, back_s) in zip(seeds, pool.map(run_agent_fault, seeds), strict=True):
            print(f"{seed}: {name}: back after {back_s:.1f} s: {'; '.join(wrong) or 'fine'}", flush=True)
            bad += bool(wrong)
    print(f"{options.runs} runs, {bad} with a violated invariant")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
