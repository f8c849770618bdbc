"""One sidecar per state folder; a dead one's lock is released."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.record import lock

HOLDER = """
import sys, time
from pathlib import Path
from sidecar.record import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_sidecar_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    first = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    with first, first.stdout:
        assert first.stdout.readline() == "held\n"

        assert lock.holder(folder) == first.pid
        with pytest.raises(lock.LockedError, match=f"process id {first.pid} is using it"), lock.held(folder):
            pass
        assert lock.holder(folder) == first.pid  # the refused one did not take it over

        os.kill(first.pid, signal.SIGKILL)
        first.wait()

        assert lock.holder(folder) is None
        with lock.held(folder):
            assert lock.holder(folder) == os.getpid()
    assert lock.holder(folder) is None


def test_lock_is_let_go_when_the_holder_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), lock.held(tmp_path):
        raise ValueError("mine")

    assert lock.holder(tmp_path) is None


def test_a_child_of_the_holder_does_not_hold_it(tmp_path: Path) -> None:
    # An engine outlives its sidecar, and the next sidecar must be able to adopt it.
    with lock.held(tmp_path):
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        assert lock.holder(tmp_path) is None
        with lock.held(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    with lock.held(tmp_path / "a"):
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_nobody_holds_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert lock.holder(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
