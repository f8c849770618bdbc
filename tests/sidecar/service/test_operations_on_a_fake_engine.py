"""Operators' commands to a running `sloguard serve`, and the life of a promotion, on a fast fake engine."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from service_process import (
    FAKE,
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
from sidecar.record.journal import JOURNAL_FILE, Journal
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.agent.process_identity import Identity
from vllm_sloguard.hooks.telemetry_client import unix_target
from vllm_sloguard.wire import control_pb2
from vllm_sloguard.wire import telemetry_pb2 as pb
from vllm_sloguard.wire.control_pb2_grpc import ControlServiceStub
from vllm_sloguard.wire.telemetry_pb2_grpc import TelemetryServiceStub


@pytest.fixture
def config_file(tmp_path: Path) -> Iterator[Path]:
    """A configuration whose incumbent has max_num_seqs=2; all processes are ended after the test."""
    path = configured(tmp_path)
    yield path
    state = load_config(path).state
    if (pid := lock.holder(state)) is not None:  # left by a failed test
        os.kill(pid, signal.SIGKILL)
    kill_engines(state)


def kill_engines(state: Path) -> None:
    for log in (state / "logs").glob("engine-*.log"):
        ProcessGroup(Identity(-1, 0.0, log.stem.removeprefix("engine-"))).kill()


def changed(config_file: Path, **sections: dict[str, Any]) -> Path:
    """The same file with some sections changed."""
    content = yaml.safe_load(config_file.read_text())
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values}
    config_file.write_text(yaml.safe_dump(content))
    return config_file


def promoted(config: Config, *seqs: int) -> None:
    """Records promotions before the sidecar starts."""
    journal = Journal(config.state)
    for n in seqs:
        journal.promote(None, config.base_digest(), {**config.engine.args, "max_num_seqs": n})
    journal.close()


def asked(config_file: Path, *words: str) -> str:
    """The output of an operator's command that succeeds."""
    done = sloguard(*words, "-c", config_file)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(config_file: Path, *words: str) -> str:
    """The single line of a refused command."""
    done = sloguard(*words, "-c", config_file)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def history(config_file: Path) -> dict[str, Any]:
    return json.loads(asked(config_file, "history", "--json"))


def kill_serving(config: Config) -> None:
    """Kills the serving engine, and waits for its replacement."""
    [record] = Journal(config.state, read_only=True).engines()
    os.kill(record.identity.pid, signal.SIGKILL)

    def another() -> bool:
        pids = [e.identity.pid for e in Journal(config.state, read_only=True).engines()]
        return record.identity.pid not in pids and state_of(config) == "serving" and serving_seqs(config) > 0

    wait_for(another, "another engine")


def publish(config: Config, count: int, ttft_s: float, sequence: int = 1) -> None:
    """Reports requests as the plugin in the serving engine does."""
    [record] = Journal(config.state, read_only=True).engines()
    request = pb.RequestFinished(
        ttft_seconds=ttft_s, e2e_seconds=ttft_s + 0.1, prompt_tokens=100, output_tokens=10, finish_reason="stop"
    )
    batch = pb.PublishRequest(
        engine_id=record.identity.engine_id,
        process=pb.Process(role=pb.PROCESS_ROLE_API_SERVER, pid=1),
        sequence=sequence,
        events=[pb.Event(time_unix_seconds=time.time(), request_finished=request)] * count,
    )
    with grpc.insecure_channel(unix_target(str(config.socket))) as channel:
        TelemetryServiceStub(channel).Publish(batch, timeout=60)


def test_a_pause_lets_no_window_open_and_outlives_the_sidecar(config_file: Path) -> None:
    config = load_config(config_file)
    serve = started(config_file)
    assert asked(config_file, "pause", "--reason", "release week") == "paused: no window will open\n"
    assert asked(config_file, "pause") == "already paused\n"
    told = asked(config_file, "pause", "--reason", "the release is late")
    assert told == 'already paused; the reason is now "the release is late", was "release week"\n'
    assert asked(config_file, "pause", "--reason", "the release is late") == "already paused\n"
    ended(serve, signal.SIGTERM)
    assert "sidecar: not running; it ended 20" in sloguard("status", config.state).stdout

    serve = started(config_file)
    assert "the release is late" in refused(config_file, "retune", "--now")
    words = sloguard("status", config.state).stdout
    assert "next window: paused since 20" in words
    assert f"serving: the file's arguments at http://127.0.0.1:{config.engine.port}, since 20" in words
    assert "sloguard resume" in refused(config_file, "retune", "--now", "--force")
    assert asked(config_file, "resume") == "resumed: windows can open again\n"
    assert asked(config_file, "resume") == "not paused\n"
    asked(config_file, "retune", "--now", "--wait")
    ended(serve, signal.SIGINT)


def test_an_abort_ends_the_window_and_the_incumbent_serves(config_file: Path) -> None:
    config = load_config(config_file)
    serve = started(config_file, FAKE_LOAD_S="60")
    assert asked(config_file, "abort") == "no window is open: the sidecar is serving\n"
    asked(config_file, "retune", "--now")
    wait_for(lambda: state_of(config) == "tuning", "tuning")
    assert "a window is open already: the sidecar is tuning" in refused(config_file, "retune", "--now")
    told = json.loads(sloguard("status", config.state, "--json").stdout)
    assert (told["serves"], told["engine_address"]) == (None, None)
    began = time.monotonic()
    assert "restoring: the window was aborted" in asked(config_file, "abort", "--wait")
    assert time.monotonic() - began < 45  # the trial's load takes longer
    assert (serving_seqs(config), ready(config)) == (2, 200)
    wait_for(lambda: history(config_file)["windows"], "the window's end")
    assert [w["outcome"] for w in history(config_file)["windows"]] == ["aborted"]
    assert asked(config_file, "abort") == "no window is open: the sidecar is serving\n"
    # An aborted window does not count as failed: the next one may open.
    asked(config_file, "retune", "--now")
    wait_for(lambda: state_of(config) == "tuning", "tuning again")
    ended(serve, signal.SIGINT)


def test_a_rollback_returns_to_what_served_before_and_quarantines(config_file: Path) -> None:
    config = load_config(config_file)
    serve = started(config_file)
    assert "nothing to roll back" in refused(config_file, "rollback")
    asked(config_file, "retune", "--now", "--wait")
    winner = serving_seqs(config)
    assert winner > 2
    assert "serving: promotion 1 at http://" in sloguard("status", config.state).stdout

    told = asked(config_file, "rollback", "--wait")
    assert "promotion 1 is rolled back and quarantined: the file's own arguments serve next" in told
    assert (serving_seqs(config), ready(config)) == (2, 200)
    assert yaml.safe_load((config.state / "promoted.yaml").read_text())["max-num-seqs"] == 2
    assert asked(config_file, "rollback") == "promotion 1 was already rolled back\n"
    assert "there is no promotion 7" in refused(config_file, "rollback", "--promotion", "7")
    [promotion] = history(config_file)["promotions"]
    assert promotion["evidence"]["outcome"] == "promoted"
    assert (promotion["current"], promotion["rollback_reason"]) == (False, "requested by the operator")
    assert "requested by the operator; its configuration is quarantined" in asked(config_file, "history")

    # It is quarantined, however good it was.
    asked(config_file, "retune", "--now", "--wait")
    assert serving_seqs(config) != winner
    trials = json.loads(sloguard("trials", config.state, "--json").stdout)
    ran = [t for t in trials if t["run"] == 2 and t["plan"]["args"]["max_num_seqs"] == winner]
    assert all(t["status"] == "refused" and "quarantined" in t["plan"]["refusal"] for t in ran)
    ended(serve, signal.SIGINT)


def test_a_rollback_goes_to_the_promotion_before(config_file: Path) -> None:
    config = load_config(config_file)
    promoted(config, 5, 8)
    serve = started(config_file)
    assert serving_seqs(config) == 8
    assert "1 is not the current promotion" in refused(config_file, "rollback", "--promotion", "1")
    assert "promotion 1 serves next" in asked(config_file, "rollback", "--wait")
    assert serving_seqs(config) == 5
    asked(config_file, "rollback", "--promotion", "1", "--wait")
    assert serving_seqs(config) == 2
    ended(serve, signal.SIGINT)


def test_a_rollback_that_was_cut_off_is_done_by_the_next_sidecar(config_file: Path) -> None:
    config = load_config(config_file)
    promoted(config, 8)
    serve = started(config_file)
    # The control service records the rollback, and the sidecar is killed before it acts on it.
    with closing(sqlite3.connect(config.state / JOURNAL_FILE, timeout=60, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO rollbacks VALUES (1, 0, 'asked for')")
        serve.kill()
        serve.communicate(timeout=120)
        db.execute("COMMIT")
    assert serving_seqs(config) == 8

    again = started(config_file)
    assert serving_seqs(config) == 2
    ended(again, signal.SIGINT)


def test_a_promotion_that_crash_loops_is_rolled_back_by_itself(config_file: Path) -> None:
    config = load_config(config_file)
    promoted(config, 5, 8)
    serve = started(config_file)
    for expected in (8, 8, 5):
        kill_serving(config)
        assert serving_seqs(config) == expected
    [first, second] = history(config_file)["promotions"]
    assert (first["current"], second["rollback_reason"]) == (True, "it crashed 3 times within 10 minutes")
    output = ended(serve, signal.SIGINT)
    assert "promotion 2 is rolled back and quarantined: it crashed 3 times within 10 minutes" in output


def test_crashes_are_counted_across_sidecars(config_file: Path) -> None:
    config = load_config(config_file)
    promoted(config, 8)
    serve = started(config_file)
    kill_serving(config)
    kill_serving(config)
    ended(serve, signal.SIGTERM)
    serve = started(config_file)
    kill_serving(config)
    assert serving_seqs(config) == 2
    ended(serve, signal.SIGINT)


def test_a_promotion_that_burns_the_error_budget_is_rolled_back_by_itself(config_file: Path) -> None:
    config = load_config(config_file)
    promoted(config, 8)
    serve = started(config_file)
    publish(config, 300, ttft_s=2.0)
    wait_for(lambda: serving_seqs(config) == 2 and state_of(config) == "serving", "rolled back")
    [promotion] = history(config_file)["promotions"]
    # The probation may be judged while requests are still being reported.
    assert re.fullmatch(
        r"(\d+) of \1 requests missed the SLO, 100\.0 times the error budget", promotion["rollback_reason"]
    )
    ended(serve, signal.SIGINT)


def test_a_probation_ends(config_file: Path) -> None:
    config = load_config(changed(config_file, promotion={"probation": {"duration": "8s"}}))
    promoted(config, 8)
    serve = started(config_file)
    publish(config, 300, ttft_s=0.1)
    wait_for(lambda: passed(config), "the probation's end")
    publish(config, 300, ttft_s=2.0, sequence=2)
    assert serving_seqs(config) == 8
    assert "has passed its probation: 300 requests, 0 of them missed the SLO" in ended(serve, signal.SIGINT)


def passed(config: Config) -> bool:
    rows = Journal(config.state, read_only=True).read("SELECT id FROM events WHERE kind = 'probation'", ())
    return bool(rows)


def test_hooks_run_around_a_window_also_when_the_sidecar_is_killed_in_it(config_file: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    hooks = {name: ["sh", "-c", f"echo {name} >> {told}"] for name in ("before_drain", "after_restore")}
    config = load_config(changed(config_file, window={"hooks": hooks}))
    serve = started(config_file, FAKE_LOAD_S="60")
    assert not told.exists()
    asked(config_file, "retune", "--now")
    wait_for(lambda: state_of(config) == "tuning", "tuning")
    assert told.read_text().split() == ["before_drain"]
    serve.kill()
    serve.communicate(timeout=120)

    again = started(config_file)
    wait_for(lambda: told.read_text().split() == ["before_drain", "after_restore"], "told of the restore")
    assert history(config_file)["windows"][-1]["outcome"] == "stopped"
    ended(again, signal.SIGINT)


@pytest.mark.parametrize(
    ("hook", "timeout", "said"),
    [
        (["sh", "-c", "echo no backend; exit 3"], "60s", "the hook before_drain failed: exit code 3: no backend"),
        (["sleep", "600"], "1s", "the hook before_drain failed: timed out after 1 s"),
        (
            ["/nowhere/hook"],
            "60s",
            "the hook before_drain failed: [Errno 2] No such file or directory: '/nowhere/hook'",
        ),
    ],
)
def test_a_hook_that_fails_leaves_the_service_as_it_is(
    config_file: Path, hook: list[str], timeout: str, said: str
) -> None:
    config = load_config(changed(config_file, window={"hooks": {"before_drain": hook, "timeout": timeout}}))
    serve = started(config_file)
    [before] = Journal(config.state, read_only=True).engines()
    assert f"serving: {said}" in asked(config_file, "retune", "--now", "--wait")
    [after] = Journal(config.state, read_only=True).engines()
    assert (after.identity, ready(config)) == (before.identity, 200)
    assert json.loads(sloguard("status", config.state, "--json").stdout)["reason"] == said
    ended(serve, signal.SIGINT)


def test_no_window_above_the_rate_or_where_it_is_not_known_but_by_force(config_file: Path) -> None:
    config = load_config(changed(config_file, window={"max_rate": 1.0}))
    serve = started(config_file, FAKE_LOAD_S="60")
    assert "less than a minute of traffic data" in refused(config_file, "retune", "--now")
    asked(config_file, "retune", "--now", "--force")
    wait_for(lambda: state_of(config) == "tuning", "tuning")
    ended(serve, signal.SIGINT)


def test_after_a_failed_window_the_next_one_waits(config_file: Path) -> None:
    """Without the load client's program, no trial can be measured."""
    config = load_config(config_file)
    serve = started(config_file)
    journal = Journal(config.state)
    # Trials can no longer be recorded, but the service must come back.
    journal.write("CREATE TRIGGER full BEFORE INSERT ON trials BEGIN SELECT raise(ABORT, 'disk full'); END", ())
    assert "restoring: the window failed: JournalError" in asked(config_file, "retune", "--now", "--wait")
    assert serving_seqs(config) == 2
    wait_for(lambda: history(config_file)["windows"], "the window's end")
    assert "disk full" in refused(config_file, "retune", "--now")
    journal.write("DROP TRIGGER full", ())
    asked(config_file, "retune", "--now", "--wait", "--force")
    assert serving_seqs(config) > 2
    ended(serve, signal.SIGINT)


def test_a_stale_sidecar_acts_no_more(config_file: Path, tmp_path: Path) -> None:
    """The lock file is deleted under a running sidecar, and a second one takes over the folder."""
    config = load_config(config_file)
    first = started(config_file)
    [record] = Journal(config.state, read_only=True).engines()
    (config.state / "lock").unlink()
    content = yaml.safe_load(config_file.read_text())
    other_file = tmp_path / "other.yaml"
    other_file.write_text(yaml.safe_dump({**content, "metrics": {"port": 0}}))
    second = started(other_file)

    output, _ = first.communicate(timeout=120)
    assert first.returncode == 1, output
    assert "another sidecar has taken over (epoch 2, this one has 1)" in output
    assert [e.identity for e in Journal(config.state, read_only=True).engines()] == [record.identity]
    assert serving_seqs(config) == 2
    assert json.loads(sloguard("status", config.state, "--json").stdout)["epoch"] == 2
    with grpc.insecure_channel(unix_target(str(config.socket))) as channel, pytest.raises(grpc.RpcError) as caught:
        ControlServiceStub(channel).Pause(control_pb2.PauseRequest(epoch=1), timeout=60)
    assert "epoch: 1 is not this controller's, which is 2" in str(caught.value)
    ended(second, signal.SIGINT)


def test_an_engine_that_can_not_even_be_executed_does_not_end_the_sidecar(tmp_path: Path) -> None:
    python = tmp_path / "python"
    shutil.copy(FAKE, python)
    config_file = changed(configured(tmp_path), engine={"python": str(python)})
    config = load_config(config_file)
    serve = started(config_file)
    python.chmod(0o600)
    [record] = Journal(config.state, read_only=True).engines()
    os.kill(record.identity.pid, signal.SIGKILL)
    wait_for(lambda: state_of(config) == "restoring", "restoring")
    time.sleep(2)
    assert serve.poll() is None
    assert ready(config) == 503
    python.chmod(0o700)
    wait_for(lambda: serving_seqs(config) == 2 and ready(config) == 200, "serving again")
    assert "Permission denied" in ended(serve, signal.SIGINT)
    kill_engines(config.state)


def test_an_engine_that_was_starting_when_its_sidecar_died_is_taken_over(config_file: Path) -> None:
    config = load_config(config_file)
    serve = started(config_file)
    [record] = Journal(config.state, read_only=True).engines()
    journal = Journal(config.state)
    serve.kill()
    serve.communicate(timeout=120)
    journal.enter("restoring", "as if it had been killed while its engine started")
    assert subprocess.run(["kill", "-STOP", str(record.identity.pid)], check=True).returncode == 0
    again = subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {record.identity.pid}"])
    later = started(config_file)
    again.wait()
    assert [e.identity for e in Journal(config.state, read_only=True).engines()] == [record.identity]
    ended(later, signal.SIGINT)
