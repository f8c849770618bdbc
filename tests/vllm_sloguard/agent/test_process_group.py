"""Process groups with real processes: whatever a command starts is ended with it."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from sidecar_cases import until

from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.agent.process_identity import ENGINE_ID_VARIABLE, Identity, boot_id

CHILD_OF_ITS_OWN = """
import subprocess, sys
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
open("child", "w").write(str(child.pid))
"""
DEAF = "trap '' TERM; echo up; while :; do sleep 0.05; done"


class Starter:
    def __init__(self, folder: Path) -> None:
        self.log = folder / "engine.log"
        self.groups: list[ProcessGroup] = []
        self._folder = folder

    def __call__(self, *command: str, **environment: str) -> ProcessGroup:
        own = {"PATH": os.environ["PATH"], **environment}
        group = ProcessGroup.start(command, uuid.uuid4().hex, self.log, own, self._folder)
        self.groups.append(group)
        return group

    def logged(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def child(self) -> psutil.Process:
        """The process whose pid the command wrote to the file "child"."""
        until(lambda: (self._folder / "child").is_file() and (self._folder / "child").read_text().strip())
        return psutil.Process(int((self._folder / "child").read_text()))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    for group in starter.groups:
        group.kill()


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_output_is_appended(start: Starter) -> None:
    start.log.write_text("before\n")

    group = start("sh", "-c", "echo out; echo err >&2; exit 3")
    until(lambda: not group.leader_alive())

    assert start.logged() == "before\nout\nerr\n"
    assert group.exit_code() == 3


def test_what_can_not_be_started_is_an_error(start: Starter) -> None:
    with pytest.raises(OSError, match="no-such-command"):
        start("no-such-command")


def test_it_bears_its_own_mark_whatever_the_environment_says(start: Starter) -> None:
    group = start("sh", "-c", f"echo ${ENGINE_ID_VARIABLE}", **{ENGINE_ID_VARIABLE: "other"})
    until(lambda: not group.leader_alive())

    assert start.logged().strip() == group.identity.engine_id


def test_a_child_that_outlives_its_leader_is_killed(start: Starter) -> None:
    group = start("sh", "-c", "sleep 600 & echo $! > child")
    until(lambda: not group.leader_alive())
    child = start.child()
    assert [member.pid for member in group.members()] == [child.pid]

    group.stop(grace_s=60)

    assert gone(child)
    assert group.members() == []


def test_a_child_without_the_mark_is_found_by_its_session(start: Starter) -> None:
    group = start("sh", "-c", "env -i sleep 600 & echo $! > child")
    until(lambda: not group.leader_alive())
    child = start.child()

    group.kill()

    assert gone(child)


def test_a_child_that_left_the_session_is_found_by_its_mark(start: Starter) -> None:
    group = start(sys.executable, "-c", CHILD_OF_ITS_OWN)
    until(lambda: not group.leader_alive())
    child = start.child()
    assert os.getsid(child.pid) != group.identity.pid

    group.kill()

    assert gone(child)


NEVER_REAPS = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"], env={**os.environ, sys.argv[1]: sys.argv[2]}, start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def test_an_ended_process_that_nobody_reaps_is_not_waited_for(start: Starter) -> None:
    seconds: list[float] = []
    for _ in range(3):
        group = start("sh", "-c", "exit 0")
        command = [sys.executable, "-c", NEVER_REAPS, ENGINE_ID_VARIABLE, group.identity.engine_id]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            child = psutil.Process(int(parent.stdout.readline()))
            began = time.monotonic()
            group.kill()
            seconds.append(time.monotonic() - began)
            assert child.status() == psutil.STATUS_ZOMBIE
            parent.kill()

    assert min(seconds) < 0.8, seconds  # it took 1 s or more


def test_a_stranger_is_no_member(start: Starter) -> None:
    one, other = start("sleep", "600"), start("sleep", "600")

    one.kill()

    assert not one.leader_alive()
    assert other.leader_alive()


def test_a_polite_process_ends_itself(start: Starter) -> None:
    group = start("sh", "-c", "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.05; done")
    until(lambda: "up" in start.logged())
    began = time.monotonic()

    group.stop(grace_s=120)

    assert time.monotonic() - began < 60
    assert group.exit_code() == 7
    assert "bye" in start.logged()


def test_one_that_is_deaf_is_killed_after_the_grace(start: Starter) -> None:
    group = start("sh", "-c", DEAF)
    until(lambda: "up" in start.logged())
    began = time.monotonic()

    group.stop(grace_s=0.5)

    assert 0.5 <= time.monotonic() - began < 60
    assert group.exit_code() == -signal.SIGKILL
    assert group.members() == []


def test_a_stopped_one_is_killed(start: Starter) -> None:
    group = start("sleep", "600")
    os.kill(group.identity.pid, signal.SIGSTOP)

    group.kill()

    assert group.exit_code() == -signal.SIGKILL


def test_kill_of_what_is_gone_does_nothing(start: Starter) -> None:
    group = start("true")
    until(lambda: not group.leader_alive())

    group.stop(grace_s=60)
    group.kill()

    assert group.exit_code() == 0


def test_another_sidecar_finds_it_by_its_identity(start: Starter) -> None:
    group = start("sh", "-c", DEAF)
    until(lambda: "up" in start.logged())

    adopted = ProcessGroup(group.identity)

    assert adopted.leader_alive()
    assert adopted.exit_code() is None
    adopted.stop(grace_s=0.2)
    assert not adopted.leader_alive()
    assert adopted.members() == []


def test_one_that_was_started_but_not_written_down_is_found_by_its_mark(start: Starter) -> None:
    group = start("sleep", "600")

    ProcessGroup(Identity(-1, group.identity.started_at, group.identity.engine_id)).kill()

    assert not group.leader_alive()


def test_an_id_that_was_used_again_is_not_it(start: Starter) -> None:
    stranger = start("sleep", "600")
    old = ProcessGroup(Identity(stranger.identity.pid, stranger.identity.started_at - 100, "of last week"))

    assert not old.leader_alive()
    old.stop(grace_s=1)

    assert stranger.leader_alive()


def test_the_session_of_a_strangers_daemon_is_left_alone(start: Starter) -> None:
    """Its first process has ended, as a daemon's does, and an old journal row has its pid."""
    daemon = start("sh", "-c", "sleep 600 & echo $! > child")
    until(lambda: not daemon.leader_alive())
    child = start.child()
    old = Identity(daemon.identity.pid, daemon.identity.started_at, "before-the-reboot", "another boot")
    same_boot = replace(old, boot_id=boot_id())

    for recorded in (old, same_boot, replace(old, boot_id="")):
        ProcessGroup(recorded).kill()

    assert not gone(child)


def test_the_same_pid_and_start_time_after_a_reboot_is_another_process(start: Starter) -> None:
    stranger = start("sleep", "600")
    identity = replace(stranger.identity, engine_id="before-the-reboot", boot_id="another boot")

    for recorded in (ProcessGroup(identity), ProcessGroup(replace(identity, boot_id=""))):
        assert not recorded.leader_alive()
        recorded.stop(grace_s=1)

    assert stranger.leader_alive()


def test_a_row_without_a_boot_id_is_proven_by_the_mark(start: Starter) -> None:
    engine = start("sh", "-c", "env -i sleep 600 & echo $! > child; sleep 600")
    child = start.child()

    ProcessGroup(replace(engine.identity, boot_id="")).kill()

    assert gone(child)
    assert not engine.leader_alive()


def test_an_id_that_nobody_has_is_not_alive() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()

    assert not ProcessGroup(Identity(ended.pid, time.time(), "none")).leader_alive()
