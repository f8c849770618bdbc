"""Faults caused by operators, other processes and old files, on the fake engine."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import psutil
import pytest
import yaml
from foreign_server import HANDLER
from forked_command import ForkedProcess
from service_process import (
    configured,
    ended,
    ready,
    serving_seqs,
    sloguard,
    started,
    state_of,
    wait_for,
)

from sidecar.config.schema import Config, load_config
from sidecar.record import lock
from sidecar.record.events import EventKind, Operations
from sidecar.record.journal import JOURNAL_FILE, Journal
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.agent.process_identity import Identity, started_s
from vllm_sloguard.hooks.telemetry_client import unix_target
from vllm_sloguard.wire import control_pb2
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceStub

FOREIGN_SERVER = f"{HANDLER}\nThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n"


@pytest.fixture
def config_file(tmp_path: Path) -> Iterator[Path]:
    """A configuration whose incumbent has max_num_seqs=2; all processes are ended after the test."""
    path = configured(tmp_path)
    yield path
    state = load_config(path).state
    if (pid := lock.holder(state)) is not None:  # left by a failed test
        os.kill(pid, signal.SIGKILL)
    for log in (state / "logs").glob("engine-*.log"):
        ProcessGroup(Identity(-1, 0.0, log.stem.removeprefix("engine-"))).kill()


def promote(config: Config, seqs: int) -> None:
    journal = Journal(config.state)
    journal.promote(None, config.base_digest(), {**config.engine.args, "max_num_seqs": seqs})
    journal.close()


def killed(serve: ForkedProcess) -> None:
    serve.kill()
    serve.communicate(timeout=120)


def only_the_main_file(state: Path) -> None:
    """Reduces the journal to what a copy of its main file alone contains."""
    shutil.copy(state / JOURNAL_FILE, state / "copied")
    for path in state.glob(f"{JOURNAL_FILE}*"):
        path.unlink()
    (state / "copied").rename(state / JOURNAL_FILE)


def test_an_older_copy_of_the_journal_does_not_end_the_engine_that_serves(config_file: Path) -> None:
    config = load_config(config_file)
    promote(config, 8)  # closing the connection checkpoints this into the main file; later writes are not
    shutil.copy(config.state / JOURNAL_FILE, config.state / "older")
    (config.state / JOURNAL_FILE).unlink()
    promote(config, 12)
    serve = started(config_file)
    assert serving_seqs(config) == 12
    [engine] = Journal(config.state, read_only=True).engines()
    killed(serve)
    for path in config.state.glob(f"{JOURNAL_FILE}*"):
        path.unlink()
    (config.state / "older").rename(config.state / JOURNAL_FILE)

    again = started(config_file)

    assert serving_seqs(config) == 12
    assert psutil.pid_exists(engine.identity.pid)
    status = sloguard("status", config.state).stdout
    assert f"the running engine (process {engine.identity.pid}) does not match the journal" in status
    refused = sloguard("retune", "--now", "-c", config_file)
    assert refused.returncode == 1
    assert "does not match the journal" in refused.stderr
    # The operator ends the engine, and the journal's configuration is started.
    os.kill(engine.identity.pid, signal.SIGTERM)
    wait_for(lambda: serving_seqs(config) == 8 and state_of(config) == "serving", "the journal's promotion")
    ended(again, signal.SIGINT)


def test_an_engine_of_which_the_journal_lost_the_row_is_taken_over(config_file: Path) -> None:
    config = load_config(config_file)
    serve = started(config_file)
    [engine] = Journal(config.state, read_only=True).engines()
    killed(serve)
    only_the_main_file(config.state)
    Journal(config.state).engine_gone(engine.identity.engine_id)

    again = started(config_file)

    assert [e.identity for e in Journal(config.state, read_only=True).engines()] == [engine.identity]
    assert "took over the engine of an earlier sidecar" in ended(again, signal.SIGINT)


def test_an_engine_whose_pid_was_not_recorded_yet_is_taken_over(config_file: Path) -> None:
    """As after a kill, or in a backup made, in the middle of a start."""
    config = load_config(config_file)
    killed(started(config_file))
    journal = Journal(config.state)
    [engine] = journal.engines()
    journal.write("UPDATE engines SET pid = 0, boot_id = ''", ())
    journal.close()

    again = started(config_file)

    assert [e.identity for e in Journal(config.state, read_only=True).engines()] == [engine.identity]
    ended(again, signal.SIGINT)


def test_tune_leaves_a_serving_engine_that_the_journal_lost_alone(config_file: Path) -> None:
    config = load_config(config_file)
    killed(started(config_file))
    [engine] = Journal(config.state, read_only=True).engines()
    Journal(config.state).engine_gone(engine.identity.engine_id)

    refused = sloguard("tune", "-c", config_file)

    assert refused.returncode == 1
    assert f"vLLM of this state folder is serving (process {engine.identity.pid})" in refused.stderr
    assert serving_seqs(config) == 2


def test_an_unrecorded_engine_that_leaves_a_probe_unanswered_is_taken_over_once_it_answers(config_file: Path) -> None:
    content = yaml.safe_load(config_file.read_text())
    content["engine"] = {**content["engine"], "hang_timeout_s": 8}  # a probe waits four seconds
    config_file.write_text(yaml.safe_dump(content))
    config = load_config(config_file)
    killed(started(config_file))
    [engine] = Journal(config.state, read_only=True).engines()
    Journal(config.state).engine_gone(engine.identity.engine_id)
    os.kill(engine.identity.pid, signal.SIGSTOP)
    with subprocess.Popen([sys.executable, "-m", "sidecar", "serve", "-c", str(config_file)]) as again:
        wait_for(lambda: lock.holder(config.state) == again.pid and state_of(config) == "starting", "starting")
        time.sleep(5)
        os.kill(engine.identity.pid, signal.SIGCONT)
        wait_for(lambda: state_of(config) == "serving", "serving")
        assert [e.identity for e in Journal(config.state, read_only=True).engines()] == [engine.identity]
        again.send_signal(signal.SIGINT)


def test_a_copied_state_folder_does_not_end_the_engine_of_the_original(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file)
    serve = started(config_file)
    [engine] = Journal(config.state, read_only=True).engines()
    shutil.copytree(config.state, tmp_path / "copy", ignore=shutil.ignore_patterns("*.sock"))
    (tmp_path / "copy").chmod(0o700)
    content = yaml.safe_load(config_file.read_text())
    content |= {"state": str(tmp_path / "copy"), "metrics": {"port": 0}}
    copied = tmp_path / "copied.yaml"
    copied.write_text(yaml.safe_dump(content))

    with subprocess.Popen(
        [sys.executable, "-m", "sidecar", "serve", "-c", str(copied)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert any("of another state folder" in line for line in other.stdout)
        other.kill()
    assert psutil.pid_exists(engine.identity.pid)
    assert serving_seqs(config) == 2
    ended(serve, signal.SIGINT)


def test_a_daemon_that_has_the_pid_of_an_old_engine_is_not_killed(config_file: Path, tmp_path: Path) -> None:
    """The state folder survived a reboot, and a recorded pid is now an unrelated daemon's session."""
    config = load_config(config_file)
    journal = Journal(config.state)
    subprocess.run(
        ["setsid", "sh", "-c", f"echo $$ > {tmp_path}/session; sleep 600 & echo $! > {tmp_path}/daemon"], check=True
    )
    session, daemon = (int(wait_for(lambda n=n: (tmp_path / n).read_text(), n)) for n in ("session", "daemon"))
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as other:
        for engine_id, pid in (("a" * 12, session), ("b" * 12, other.pid)):
            journal.engine_starting(engine_id, "serving", {"log": "logs/none"})
            at = started_s(daemon if pid == session else pid)
            journal.engine_started(Identity(pid, at, engine_id, "the boot before"))
        journal.close()

        serve = started(config_file)

        assert psutil.pid_exists(daemon)
        assert other.poll() is None
        assert [e.identity.pid for e in Journal(config.state, read_only=True).engines()] != [session, other.pid]
        ended(serve, signal.SIGINT)
        assert psutil.pid_exists(daemon)
        assert other.poll() is None
        other.kill()
    os.kill(daemon, signal.SIGKILL)


@pytest.mark.parametrize("same_model", [True, False])
def test_a_foreign_server_on_the_port_is_not_taken_for_the_engine(config_file: Path, same_model: bool) -> None:
    """The foreign server binds the port between the sidecar's check and the engine's bind."""
    config = load_config(config_file)
    serve = started(config_file, FAKE_START_S="2")
    [record] = Journal(config.state, read_only=True).engines()
    os.kill(record.identity.pid, signal.SIGKILL)
    wait_for(lambda: not port_taken(config.engine.port), "the port is free")
    wait_for(lambda: newer_engine(config, record.identity.pid), "the next engine")
    command = [sys.executable, "-c", FOREIGN_SERVER, str(config.engine.port), config.model if same_model else "other"]
    with subprocess.Popen(command) as foreign:
        wait_for(lambda: port_taken(config.engine.port), "the foreign server")
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            assert state_of(config) != "serving"
            assert ready(config) == 503
            time.sleep(0.1)
        assert foreign.poll() is None
        foreign.kill()
    wait_for(lambda: serving_seqs(config) == 2 and state_of(config) == "serving", "serving")
    output = ended(serve, signal.SIGINT)
    assert f"Address already in use: 127.0.0.1:{config.engine.port}, by process {foreign.pid}" in output


def port_taken(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def newer_engine(config: Config, pid: int) -> bool:
    rows = Journal(config.state, read_only=True).engines()
    return bool(rows) and rows[-1].identity.pid not in (0, pid)


def changed(config_file: Path, **window: object) -> Config:
    """The configuration with a changed window section."""
    content = yaml.safe_load(config_file.read_text())
    content["window"] = {**content["window"], **window}
    config_file.write_text(yaml.safe_dump(content))
    return load_config(config_file)


def kill_engine(config: Config) -> float:
    """Kills the serving engine; returns the time in monotonic seconds."""
    [record] = Journal(config.state, read_only=True).engines()
    os.kill(record.identity.pid, signal.SIGKILL)
    return time.monotonic()


def test_a_hook_that_hangs_delays_neither_the_restart_nor_a_stop(config_file: Path) -> None:
    hooks = {"before_drain": ["true"], "after_restore": ["sleep", "300"], "timeout": "5m"}
    config = changed(config_file, hooks=hooks)
    serve = started(config_file)
    assert sloguard("retune", "--now", "--wait", "-c", config_file).returncode == 0  # after_restore runs from here on
    assert ready(config) == 200
    began = kill_engine(config)
    wait_for(lambda: ready(config) == 503, "the crash is noticed")
    wait_for(lambda: ready(config) == 200, "serving again")
    assert time.monotonic() - began < 20
    began = time.monotonic()
    ended(serve, signal.SIGTERM)
    assert time.monotonic() - began < 30


def test_a_hook_that_leaves_a_child_behind_has_succeeded(config_file: Path) -> None:
    hooks = {"before_drain": ["sh", "-c", "sleep 60 & echo told"], "timeout": "20s"}
    changed(config_file, hooks=hooks)
    serve = started(config_file)
    asked = sloguard("retune", "--now", "--wait", "-c", config_file)
    assert "the hook before_drain failed" not in asked.stdout
    assert "tuning" in asked.stdout
    ended(serve, signal.SIGINT)


def test_a_locked_journal_delays_no_restart_and_the_crash_is_recorded_later(config_file: Path) -> None:
    config = load_config(config_file)
    serve = started(config_file)
    before = time.time()
    [record] = Journal(config.state, read_only=True).engines()
    with closing(sqlite3.connect(config.state / JOURNAL_FILE, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        os.kill(record.identity.pid, signal.SIGKILL)
        wait_for(lambda: serving_seqs(config) == 0, "the engine is gone")
        wait_for(lambda: serving_seqs(config) == 2, "serving again")
        assert time.monotonic() - began < 15
        crashed_by = time.time()
        time.sleep(2)
    operations = Operations(Journal(config.state, read_only=True), config.base_digest())
    [crash] = wait_for(lambda: operations.events([EventKind.CRASH]), "the crash is recorded")
    assert before <= crash.at <= crashed_by
    wait_for(lambda: state_of(config, since=before) == "serving", "the state is recorded")
    ended(serve, signal.SIGINT)


def test_a_deleted_write_ahead_log_is_noticed_and_nothing_is_lost(config_file: Path) -> None:
    config = load_config(config_file)
    promote(config, 8)
    serve = started(config_file)
    before = [state.at for state in Journal(config.state, read_only=True).states()]
    for name in ("-wal", "-shm"):
        (config.state / f"{JOURNAL_FILE}{name}").unlink()
    time.sleep(2)

    assert sloguard("pause", "-c", config_file).stdout == "paused: no window will open\n"
    journal = Journal(config.state, read_only=True)
    assert [state.at for state in journal.states()][: len(before)] == before
    assert journal.promoted(config.base_digest()) == {**config.engine.args, "max_num_seqs": 8}
    output = ended(serve, signal.SIGINT)
    assert "was deleted while in use: the journal is restored" in output


def test_a_pause_after_an_accepted_retune_wins_or_says_that_it_has_started(config_file: Path) -> None:
    config = load_config(config_file)
    serve = started(config_file, FAKE_LOAD_S="60")
    with grpc.insecure_channel(unix_target(str(config.socket))) as channel:
        stub = ControlServiceStub(channel)
        stub.Retune(control_pb2.RetuneRequest(), timeout=60)
        said = stub.Pause(control_pb2.PauseRequest(reason="release"), timeout=60).summary
    if said == "paused: no window will open; the pending retune is cancelled":
        time.sleep(2)
        assert state_of(config) == "serving"
        expected = ("cancelled", "paused before it started")
    else:
        assert said == "paused: no window will open; the window in progress continues: `sloguard abort` ends it"
        assert sloguard("abort", "--wait", "-c", config_file).returncode == 0
        expected = ("done", "aborted: the window was aborted")
    actions = wait_for(lambda: settled(config_file), "the retune's outcome")
    assert (actions[0]["outcome"], actions[0]["result"]) == expected
    assert [(o["kind"], o["door"]) for o in actions[:2]] == [("retune", "cli"), ("pause", "cli")]
    ended(serve, signal.SIGINT)


def settled(config_file: Path) -> list[dict[str, str]] | None:
    """Waits until all actions have an outcome, and returns them."""
    actions = json.loads(sloguard("history", "--json", "-c", config_file).stdout)["actions"]
    return actions if all(action["outcome"] not in ("pending", "started") for action in actions) else None


def test_a_drain_waits_for_requests_that_vllm_still_counts(config_file: Path) -> None:
    """A request arrives during the notice and takes longer than the notice."""
    config = changed(config_file, notice="1s")
    serve = started(config_file)
    assert sloguard("retune", "--now", "-c", config_file).returncode == 0
    wait_for(lambda: state_of(config) == "draining", "draining")
    body = json.dumps({"model": config.model, "prompt": "abc", "max_tokens": 1, "seconds": 3}).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{config.engine.port}/v1/completions", data=body, timeout=30) as done:
        assert done.status == 200
        assert state_of(config) == "draining"
    wait_for(lambda: state_of(config) != "draining", "the drain's end")
    ended(serve, signal.SIGINT)
