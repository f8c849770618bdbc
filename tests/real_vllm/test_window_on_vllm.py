"""`sloguard serve` on real vLLM: killed in each state of a window, and with a promotion in a crash loop.

A kill while promoting is covered on fake engines (tests/chaos): whether a window promotes depends on noise here.
"""

import http.client
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_bench import INCUMBENT, write_config

from sidecar.config.schema import Config, load_config
from sidecar.record.events import Operations
from sidecar.record.journal import JOURNAL_FILE, Journal, JournalError
from sidecar.record.trial import TrialStatus
from vllm_sloguard.agent.engine_http import EngineHttp, Unanswered
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.agent.process_identity import Identity

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

SLOGUARD = [sys.executable, "-m", "sidecar"]
SEARCH: dict[str, Any] = {"unguarded": [], "budget": 2, "knobs": {"max_num_seqs": {"low": 4, "high": 64}}}
# The service must be back this soon after a kill.
BACK_S = 30.0


@pytest.fixture
def config_file(tmp_path: Path) -> Iterator[Path]:
    """Two crashes are a crash loop here, which saves engine starts."""
    path = write_config(
        tmp_path,
        search=SEARCH,
        workload={"rate": 6, "requests": 60, "output_tokens": 96},
        slo={"ttft_p99_ms": 20000, "itl_p99_ms": 500, "e2e_p99_ms": 20000},
        window={"duration": "20m", "notice": "5s"},
        promotion={"probation": {"crashes": 2}, "pairs": [2]},
        # One request at a time: the incumbent is much slower than any candidate, on any machine.
        engine={"args": {**INCUMBENT, "max-num-seqs": 1}, "forked_serving": True},
    )
    yield path
    config = load_config(path)
    found = journal(config)
    for left in found.engines() if found is not None else []:
        ProcessGroup(left.identity).kill()
    for log in (config.state / "logs").glob("engine-*.log"):
        ProcessGroup(Identity(-1, 0.0, log.stem.removeprefix("engine-"))).kill()


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 400) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.1)
    return found


def journal(config: Config) -> Journal | None:
    with suppress(JournalError):  # there is none yet
        return Journal(config.state, read_only=True)
    return None


def in_state(config: Config, name: str, since: float = 0.0) -> bool:
    found = journal(config)
    record = found.state() if found is not None else None
    return record is not None and record.state == name and record.at >= since


def engines(config: Config, role: str) -> list[Identity]:
    """The recorded engines that have a process."""
    found = journal(config)
    records = found.engines() if found is not None else []
    return [e.identity for e in records if e.role == role and e.identity.pid > 0]


def answers(config: Config) -> bool:
    """Whether the service port generates a token."""
    try:
        EngineHttp(config.engine.host, config.engine.port).complete("a", 1, 10.0)
    except Unanswered:
        return False
    return True


def ready(config: Config) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{config.metrics.port}/ready", timeout=2) as response:
            return response.status == 200
    except (OSError, http.client.HTTPException):
        return False


def served_seqs(config: Config) -> int:
    """max_num_seqs of the serving engine, as it was started."""
    found = journal(config)
    assert found is not None
    [record] = [engine for engine in found.engines() if engine.role == "serving"]
    return record.launch["args"]["max_num_seqs"]


def serve(config_file: Path) -> "subprocess.Popen[bytes]":
    log = (config_file.parent / "serve.log").open("ab")
    with log:
        return subprocess.Popen([*SLOGUARD, "serve", "-c", str(config_file)], stdout=log, stderr=subprocess.STDOUT)


def command(config_file: Path, *words: str) -> None:
    done = subprocess.run([*SLOGUARD, *words, "-c", str(config_file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def restart_after_kill(
    config_file: Path, process: "subprocess.Popen[bytes]"
) -> "tuple[subprocess.Popen[bytes], float]":
    """Kills the sidecar, starts another one, and returns it with the seconds until the service was back."""
    config = load_config(config_file)
    process.kill()
    process.wait()
    killed, began = time.time(), time.monotonic()
    again = serve(config_file)
    wait_for(lambda: in_state(config, "serving", killed) and ready(config) and answers(config), "the service again")
    took_s = time.monotonic() - began
    connection = sqlite3.connect(f"{(config.state / JOURNAL_FILE).as_uri()}?mode=ro", uri=True)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    found = journal(config)
    assert found is not None
    assert TrialStatus.RUNNING not in {t.status for t in found.trials()}
    assert engines(config, "trial") == []
    assert len(engines(config, "serving")) == 1
    return again, took_s


def test_the_service_recovers_from_a_kill_in_every_state(config_file: Path) -> None:
    config = load_config(config_file)
    incumbent = config.engine.args["max_num_seqs"]
    seconds: dict[str, float] = {}
    process = serve(config_file)
    try:
        wait_for(lambda: engines(config, "serving"), "an engine that starts")
        process, seconds["starting"] = restart_after_kill(config_file, process)
        [serving] = engines(config, "serving")
        process, seconds["serving"] = restart_after_kill(config_file, process)
        command(config_file, "retune", "--now")
        wait_for(lambda: in_state(config, "draining"), "the drain")
        process, seconds["draining"] = restart_after_kill(config_file, process)
        assert engines(config, "serving") == [serving]

        command(config_file, "retune", "--now")
        wait_for(lambda: engines(config, "trial"), "a trial")
        process, seconds["tuning"] = restart_after_kill(config_file, process)

        command(config_file, "retune", "--now")
        wait_for(lambda: engines(config, "trial"), "another trial")
        command(config_file, "abort")
        wait_for(lambda: in_state(config, "restoring") and engines(config, "serving"), "the restore")
        process, seconds["restoring"] = restart_after_kill(config_file, process)

        command(config_file, "retune", "--now")
        wait_for(lambda: in_state(config, "validating") and engines(config, "trial"), "a validation")
        process, seconds["validating"] = restart_after_kill(config_file, process)
        assert served_seqs(config) == incumbent
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    times = ", ".join(f"{state} {s:.1f} s" for state, s in seconds.items())
    print(f"recovery after kill -9: {times}")
    assert max(seconds.values()) < BACK_S, times


def test_a_promotion_in_a_crash_loop_is_rolled_back(config_file: Path) -> None:
    config = load_config(config_file)
    base = config.base_digest()
    own = Journal(config.state)
    own.promote(None, base, {**config.engine.args, "max_num_seqs": 7})
    own.close()
    process = serve(config_file)
    try:
        wait_for(lambda: in_state(config, "serving") and answers(config), "the promotion")
        assert served_seqs(config) == 7
        for crash in (1, 2):
            [identity] = engines(config, "serving")
            children = psutil.Process(identity.pid).children()
            core = next(c for c in children if "resource_tracker" not in " ".join(c.cmdline()))
            killed, began = time.time(), time.monotonic()
            os.kill(core.pid, signal.SIGKILL)
            wait_for(lambda killed=killed: in_state(config, "serving", killed) and answers(config), "serving again")
            print(f"crash {crash}: served again after {time.monotonic() - began:.1f} s, seqs {served_seqs(config)}")
        assert served_seqs(config) == config.engine.args["max_num_seqs"]
        assert ready(config)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    [promotion] = Operations(Journal(config.state, read_only=True), base).promotions()
    assert promotion.rollback_reason == "it crashed 2 times within 10 minutes"
