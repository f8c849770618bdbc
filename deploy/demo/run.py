"""The whole story on real vLLM: serve, drain, tune, promote or restore, and serve again. `make demo` runs it."""

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from sidecar.format import change
from sidecar.record import lock
from sidecar.record.decisions import Decision, Outcome
from sidecar.record.journal import Journal
from sidecar.record.run_snapshot import read_run
from sidecar.record.trial import Role, Trial, TrialStatus
from vllm_sloguard.agent.process_group import ProcessGroup

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "sloguard.yaml"
SLOGUARD = str(Path(sys.executable).parent / "sloguard")
START_TIMEOUT_S = 300
# The load is this much of what the incumbent sustains.
OVERLOAD = 1.5
CALIBRATION_S = 8.0
# A closed loop: enough clients that one always waits, and few enough that they take no CPU from vLLM.
CLIENTS = 4


def main() -> int:
    """Runs the demo; returns 0 if the incumbent was replaced by a better configuration."""
    began = time.monotonic()
    settings = yaml.safe_load(CONFIG.read_text())
    state = (HERE / settings["state"]).resolve()
    clear(state)
    state.mkdir(mode=0o700, parents=True)

    step("vLLM starts with the plugin, under the sidecar; how many requests/s does it sustain?")
    config = state / "sloguard.yaml"
    write_config(config, settings, state)
    serve = started(config, state)
    base = f"http://127.0.0.1:{settings['engine']['port']}"
    try:
        sustained = sustained_rate(base, settings["workload"])
        # SIGTERM stops the sidecar alone; the next one takes the running vLLM over.
        stopped(serve, signal.SIGTERM)
        settings["workload"]["rate"] = round(OVERLOAD * sustained, 1)
        write_config(config, settings, state)
        print(f"it sustains {sustained:.1f} requests/s; the load is {settings['workload']['rate']:g} requests/s")
        serve = started(config, state)
        print(f"live page: http://127.0.0.1:{settings['page']['port']}/")

        step("a tuning window: vLLM is drained and configurations are tried, one of them unguarded")
        asked_at = time.monotonic()
        subprocess.run([SLOGUARD, "retune", "--now", "--wait", "--yes", "-c", str(config)], check=True)
        away_s = time.monotonic() - asked_at

        step("every trial")
        subprocess.run([SLOGUARD, "trials", str(state)], check=True)

        step("what is running now")
        subprocess.run([SLOGUARD, "status", "-c", str(config)], check=True)
        print(f"completion: {complete(base)!r}")
    finally:
        code = stopped(serve, signal.SIGINT)

    step("the demo in ten lines")
    promoted, lines = summary(state, sustained, settings["workload"]["rate"], away_s)
    for number, line in enumerate(lines, 1):
        print(f"{number:2}. {line}")
    print(f"({(time.monotonic() - began) / 60:.1f} minutes)")
    return 0 if promoted and code == 0 else 1


def write_config(path: Path, settings: dict[str, Any], state: Path) -> None:
    """Writes the configuration of the demo with absolute paths, so that it can be in the state folder.

    Forked serving (docs/starts.md) makes each of its starts a matter of seconds.
    """
    absolute = {"model": str(HERE / settings["model"]), "state": str(state)}
    engine = {**settings["engine"], "forked_serving": True}
    path.write_text(yaml.safe_dump({**settings, **absolute, "engine": engine}, sort_keys=False))


def clear(state: Path) -> None:
    """Ends engines that an earlier demo left, and removes its state."""
    if not state.exists():
        return
    if (pid := lock.holder(state)) is not None:
        raise SystemExit(f"the sidecar with process id {pid} still uses {state}")
    if (state / "journal.sqlite").exists():
        for record in Journal(state, read_only=True).engines():
            ProcessGroup(record.identity).kill()
    shutil.rmtree(state)


def step(text: str) -> None:
    """Prints a heading."""
    print(f"\n== {text}", flush=True)


def started(config: Path, state: Path) -> "subprocess.Popen[bytes]":
    """`sloguard serve`, once it serves."""
    with (state / "serve.log").open("ab") as log:
        serve = subprocess.Popen([SLOGUARD, "serve", "-c", str(config)], stdout=log, stderr=log)
    try:
        wait_serving(serve, state)
    except BaseException:
        stopped(serve, signal.SIGINT)
        raise
    return serve


def stopped(serve: "subprocess.Popen[bytes]", how: signal.Signals) -> int:
    """The exit code of `sloguard serve` after the signal; SIGINT stops vLLM too."""
    if serve.poll() is None:
        serve.send_signal(how)
    try:
        return serve.wait(90)
    except subprocess.TimeoutExpired:
        serve.kill()
        raise


def wait_serving(serve: "subprocess.Popen[bytes]", state: Path) -> None:
    """Waits until the journal has vLLM serving under this sidecar."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if serve.poll() is not None:
            raise SystemExit(f"sloguard serve ended with code {serve.returncode}; see {state / 'serve.log'}")
        if lock.holder(state) == serve.pid:
            with closing(Journal(state, read_only=True)) as journal:
                record = journal.state()
            if record is not None and record.state == "serving":
                return
        time.sleep(0.5)
    raise SystemExit(f"nothing was serving after {START_TIMEOUT_S} s; the logs are in {state / 'logs'}")


def sustained_rate(base: str, workload: dict[str, Any]) -> float:
    """Requests/s that vLLM completes when a few clients each send the next request as soon as one is answered."""
    model = json.loads(fetch(f"{base}/v1/models"))["data"][0]["id"]
    body = {"model": model, "max_tokens": workload["output_tokens"], "ignore_eos": True, "temperature": 0}
    begins = time.monotonic() + CALIBRATION_S / 4  # the first requests are a warm-up
    ends = begins + CALIBRATION_S
    answered: list[float] = []

    def client(seed: int) -> None:
        chosen = random.Random(seed)  # noqa: S311 - prompts, not secrets
        while time.monotonic() < ends:
            prompt = [chosen.randrange(3, 200) for _ in range(workload["input_tokens"])]
            fetch(f"{base}/v1/completions", json.dumps({**body, "prompt": prompt}).encode())
            answered.append(time.monotonic())

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    counted = sum(begins <= at <= ends for at in answered)
    if not counted:
        raise SystemExit(f"vLLM completed no request within {CALIBRATION_S:.0f} s")
    return counted / CALIBRATION_S


def complete(base: str) -> str:
    """Requests one completion."""
    models = json.loads(fetch(f"{base}/v1/models"))
    body = {"model": models["data"][0]["id"], "prompt": "The quick brown fox", "max_tokens": 8, "temperature": 0}
    return json.loads(fetch(f"{base}/v1/completions", json.dumps(body).encode()))["choices"][0]["text"]


def fetch(url: str, body: bytes | None = None) -> bytes:
    """The response of an HTTP request on this machine."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        return response.read()


def summary(state: Path, sustained: float, rate: float, away_s: float) -> tuple[bool, list[str]]:
    """Whether a configuration was promoted, and what happened, for a reader who sees this for the first time."""
    snapshot = read_run(state)
    decision, trials = snapshot.decision, snapshot.trials
    promoted = decision is not None and decision.outcome is Outcome.PROMOTED
    crashed = [t for t in trials if t.status is TrialStatus.CRASHED]
    searched = [t for t in trials if t.plan.role in (Role.BASELINE, Role.SEARCH, Role.UNGUARDED)]
    met = sum(t.status is TrialStatus.FEASIBLE for t in searched)
    folder = state.relative_to(Path.cwd()) if state.is_relative_to(Path.cwd()) else state
    return promoted, [
        f"vLLM served a small model, {snapshot.run.incumbent['max_num_seqs']} requests at a time (max_num_seqs).",
        f"That sustains {sustained:.1f} requests/s; the demo sends {rate:g}, more than it can take.",
        f"sloguard drained vLLM, tried other settings and was back after {away_s / 60:.1f} minutes.",
        f"It tried {len(searched)} configurations; {met} of them met the latency limits (the SLO).",
        _crash_line(crashed),
        _candidate_line(trials, snapshot.run.incumbent),
        _comparison_line(trials),
        _decision_line(decision, folder),
        f"The whole story with its figures: sloguard report {folder} -o report.html",
        'Your turn: sloguard init --from "vllm serve MODEL --your-flags"',
    ]


def _crash_line(crashed: list[Trial]) -> str:
    if not crashed:
        return "None of them crashed."
    crash = next(t.result.crash for t in crashed if t.result is not None and t.result.crash is not None)
    category = str(crash.category).replace("_", " ")
    return f"{len(crashed)} crashed ({category}; one is unguarded on purpose); no user was connected."


def _candidate_line(trials: tuple[Trial, ...], incumbent: dict[str, Any]) -> str:
    chosen = next((t for t in trials if t.plan.role is Role.VALIDATION), None)
    if chosen is None:
        return "No configuration was better than the one that served."
    ran = chosen.args_that_ran
    changes = [change(name, incumbent.get(name), ran[name]) for name in ran if incumbent.get(name) != ran[name]]
    return f"The best candidate: {', '.join(changes)}."


def _comparison_line(trials: tuple[Trial, ...]) -> str:
    means: list[float] = []
    for role in (Role.REFERENCE, Role.VALIDATION):
        measured = [t.result.measurement for t in trials if t.plan.role is role and t.result is not None]
        if known := [m.e2e_mean_ms for m in measured if m is not None and m.e2e_mean_ms is not None]:
            means.append(fmean(known))
    if len(means) < 2:
        return "It was not compared with the incumbent in A/B restarts."
    return f"Both again, on fresh engines: mean latency {means[0]:.0f} ms before, {means[1]:.0f} ms with the candidate."


def _decision_line(decision: Decision | None, folder: Path) -> str:
    if decision is None:
        return f"There was no decision; see {folder / 'serve.log'}."
    if decision.outcome is Outcome.PROMOTED:
        return f"Decision: promoted. vLLM serves it from now on ({folder / 'promoted.yaml'})."
    return f"Decision: {decision.outcome}, so the former configuration serves again: {decision.reason}."


if __name__ == "__main__":
    sys.exit(main())
