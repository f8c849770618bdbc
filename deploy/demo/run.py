"""The whole story on real vLLM: serve, drain, tune, promote or restore, and serve again. `make demo` runs it."""

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from sidecar.record import lock
from sidecar.record.journal import Journal
from vllm_sloguard.agent.process_group import ProcessGroup

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "sloguard.yaml"
SLOGUARD = str(Path(sys.executable).parent / "sloguard")
START_TIMEOUT_S = 300


def main() -> int:
    """Runs the demo; returns 0 if every step succeeded."""
    began = time.monotonic()
    settings = yaml.safe_load(CONFIG.read_text())
    state = (HERE / settings["state"]).resolve()
    clear(state)

    step("vLLM starts with the plugin, under the sidecar")
    serve = subprocess.Popen([SLOGUARD, "serve", "-c", str(CONFIG)], stdout=subprocess.DEVNULL)
    try:
        wait_serving(serve, state)
        base = f"http://127.0.0.1:{settings['engine']['port']}"
        print(f"completion: {complete(base)!r}")
        print(f"live page: http://127.0.0.1:{settings['page']['port']}/")

        step("a tuning window: vLLM is drained and configurations are tried, one of them unguarded")
        subprocess.run([SLOGUARD, "retune", "--now", "--wait", "-c", str(CONFIG)], check=True)

        step("every trial")
        subprocess.run([SLOGUARD, "trials", str(state)], check=True)
        trials: list[dict[str, Any]] = json.loads(run("trials", str(state), "--json"))
        crashes = [t for t in trials if t["status"] == "crashed"]
        for trial in crashes:
            crash = trial["result"]["crash"]
            print(f"trial {trial['number']} crashed: {crash['category']} while {crash['phase']}: {crash['evidence']}")

        step("the decision and the current configuration")
        status = json.loads(run("status", str(state), "--json"))
        print(f"{status['decision']['outcome']}: {status['decision']['reason']}")
        promoted = state / "promoted.yaml"
        if promoted.exists():  # a window that failed decides nothing
            print(f"{promoted}:\n\n{promoted.read_text()}")
        print(f"completion: {complete(base)!r}")
        show_metrics(settings["metrics"]["port"])
    finally:
        serve.send_signal(signal.SIGINT)
        try:
            code = serve.wait(90)
        except subprocess.TimeoutExpired:
            serve.kill()
            raise

    ran = [t for t in trials if t["status"] in ("feasible", "infeasible", "crashed")]
    print(f"\n{len(ran)} trials, {len(crashes)} crashed, {(time.monotonic() - began) / 60:.1f} minutes")
    print(f"as an HTML report: {SLOGUARD} report {state} -o report.html")
    return 0 if len(ran) >= 10 and crashes and code == 0 else 1


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


def run(*args: str) -> str:
    """The output of one `sloguard` command."""
    return subprocess.run([SLOGUARD, *args], check=True, capture_output=True, text=True).stdout


def wait_serving(serve: subprocess.Popen[bytes], state: Path) -> None:
    """Waits until `sloguard status` reports serving."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if serve.poll() is not None:
            raise SystemExit(f"sloguard serve ended with code {serve.returncode}")
        if (state / "journal.sqlite").exists() and json.loads(run("status", str(state), "--json"))[
            "state"
        ] == "serving":
            return
        time.sleep(1)
    raise SystemExit(f"nothing was serving after {START_TIMEOUT_S} s; the logs are in {state / 'logs'}")


def complete(base: str) -> str:
    """Requests one completion."""
    models = json.loads(fetch(f"{base}/v1/models"))
    body = {"model": models["data"][0]["id"], "prompt": "The quick brown fox", "max_tokens": 8, "temperature": 0}
    return json.loads(fetch(f"{base}/v1/completions", json.dumps(body).encode()))["choices"][0]["text"]


def show_metrics(port: int) -> None:
    """Prints a few metrics."""
    shown = ("sloguard_trials_total", "sloguard_crashes_total", "sloguard_decisions_total", "sloguard_requests_total")
    lines = fetch(f"http://127.0.0.1:{port}/metrics").decode().splitlines()
    for line in lines:
        if line.startswith(shown) and not line.endswith(" 0.0"):
            print(line)


def fetch(url: str, body: bytes | None = None) -> bytes:
    """The response of an HTTP request on this machine."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        return response.read()


if __name__ == "__main__":
    sys.exit(main())
