"""`sloguard serve` as a process on the fake engine, and helpers to query it."""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import yaml
from engine_bench import write_config
from forked_command import ForkedProcess, run_forked, start_forked

from sidecar.config.schema import Config, load_config
from sidecar.record import lock
from sidecar.record.journal import Journal, JournalError

SLOGUARD = [sys.executable, "-m", "sidecar.cli.main"]
FAKE = Path(__file__).resolve().parent / "fake_vllm.py"
LEASE_S = 3.0  # of the sidecars at an agent; 10 by default
SLO = {"ttft_p99_ms": 500, "itl_p99_ms": 60, "e2e_p99_ms": 3000, "error_rate": 0.01}


def configured(
    folder: Path, *, incumbent: int = 2, unguarded: tuple[int, ...] = (), start_timeout_s: float = 60, **search: Any
) -> Path:
    """Writes the configuration."""
    return write_config(
        folder,
        engine={
            "args": {"max-num-seqs": incumbent, "max-model-len": 512},
            "python": str(FAKE),
            "drain_timeout_s": 5,
            "start_timeout_s": start_timeout_s,
            "live_trials": False,  # the fake engine knows none
        },
        slo=SLO,
        workload={"requests": 50},
        search={
            "budget": 4,
            "knobs": {"max_num_seqs": {"low": 4, "high": 12}},
            "unguarded": [{"max_num_seqs": n} for n in unguarded],
            **search,
        },
        window={"duration": "10m", "notice": "0s"},
    )


def at_agent(config_file: Path, address: str, **engine: Any) -> Path:
    """Changes a configuration so that an agent runs its engines."""
    content = yaml.safe_load(config_file.read_text())
    for name in ("python", "env"):
        content["engine"].pop(name, None)
    content["engine"] |= {"agents": [address], "agent_lease_s": LEASE_S, **engine}
    config_file.write_text(yaml.safe_dump(content))
    return config_file


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 120) -> Any:
    """Polls until ``condition`` is true, and returns it."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.05)
    return found


def state_of(config: Config, since: float = 0.0) -> str:
    """The state in the journal, where it was entered after ``since``."""
    try:
        record = Journal(config.state, read_only=True).state()
    except JournalError:  # there is none yet
        return ""
    return record.state if record and record.at >= since else ""


def serving_seqs(config: Config) -> int:
    """max_num_seqs of the engine on the service port; 0 where there is none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{config.engine.port}/load", timeout=30) as response:
            return json.loads(response.read())["max_num_seqs"]
    except (OSError, HTTPException):  # it may be ending
        return 0


def ready(config: Config) -> int:
    """The status of /ready; 0 without an answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{config.metrics.port}/ready", timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException):  # it may be ending
        return 0


def sloguard(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs one command to completion."""
    return run_forked(list(map(str, args)), environment)


def started(config_file: Path, **environment: str) -> ForkedProcess:
    """`sloguard serve`, once it serves."""
    began = time.time()
    process = start_forked(["serve", "-c", str(config_file)], environment, config_file.with_name("said.txt"))
    config = load_config(config_file)

    def serves() -> bool:
        # The state of an earlier sidecar is in the journal too.
        return lock.holder(config.state) == process.pid and state_of(config, since=began) == "serving"

    wait_for(lambda: process.poll() is not None or serves(), "serving")
    return process


def ended(process: ForkedProcess, number: signal.Signals) -> str:
    """Its output, once it has exited with code 0 after signal ``number``."""
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output
