"""`sloguard serve` as a process on the fake engine, for tests that observe it from outside."""

import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine_bench import write_config
from forked_command import ForkedProcess, run_forked, start_forked
from local_agents import end_engines, end_local_agents

from sidecar.config.schema import load_config
from sidecar.record.journal import Journal, JournalError

FAKE = Path(__file__).with_name("fake_vllm.py")
_PATIENCE_S = 120.0


def fake_config(folder: Path, **sections: Any) -> Path:
    """A configuration with the fake engine; ``sections`` override it."""
    engine = {
        "args": {"max-num-seqs": 2, "max-model-len": 512},
        "python": str(FAKE),
        "drain_timeout_s": 5,
        "start_timeout_s": 60,
        "live_trials": False,
        **sections.pop("engine", {}),
    }
    search: dict[str, Any] = {"budget": 3, "knobs": {"max_num_seqs": {"low": 4, "high": 12}}, "unguarded": []}
    settings: dict[str, Any] = {
        "workload": {"requests": 50},
        "search": search,
        "window": {"duration": "10m", "notice": "0s"},
        **sections,
    }
    return write_config(folder, engine=engine, **settings)


@contextmanager
def serving(config_file: Path, **environment: str) -> Generator[ForkedProcess]:
    """`sloguard serve`, once it serves; ends it and its engines afterwards. Its output goes to ``said``."""
    config = load_config(config_file)
    said = said_by(config_file)
    began = time.time()
    try:
        process = start_forked(["serve", "-c", str(config_file)], environment, said)
        try:
            await_state(config.state, "serving", process, since=began)
            yield process
        finally:
            process.kill()
            process.wait()
    finally:
        end_local_agents(config.state.parent)
        end_engines(config.state)


def said_by(config_file: Path) -> Path:
    """The file with the output of ``serving``."""
    return config_file.with_name("said.txt")


def await_state(state: Path, wanted: str, process: ForkedProcess, since: float = 0.0) -> None:
    """Waits for state ``wanted``, entered after ``since``: an earlier sidecar's states are in the journal, too."""
    deadline = time.monotonic() + _PATIENCE_S
    while state_of(state, since) != wanted:
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, f"{wanted}: not within {_PATIENCE_S:.0f} s"
        time.sleep(0.05)


def state_of(state: Path, since: float = 0.0) -> str:
    """The last state in the journal that was entered after ``since``; empty where there is none."""
    try:
        record = Journal(state, read_only=True).state()
    except JournalError:
        return ""
    return record.state if record and record.at >= since else ""


def sloguard(*args: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs one command to completion."""
    return run_forked(list(map(str, args)), environment)
