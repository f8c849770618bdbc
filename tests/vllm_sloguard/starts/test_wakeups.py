"""Real-time scheduling of the load client's thread, where it is permitted."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vllm_sloguard.starts.wakeups import prompt_wakeups

ROOT = Path(__file__).resolve().parents[3]
UNPRIVILEGED = """
import os
from vllm_sloguard.starts.wakeups import prompt_wakeups
os.setuid(65534)  # after the imports, which this user may not read
for _ in range(2):
    with prompt_wakeups():
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
        assert os.getpriority(os.PRIO_PROCESS, 0) == 5
print(os.getpriority(os.PRIO_PROCESS, 0))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may choose a scheduling policy")
def test_this_thread_alone_is_scheduled_in_real_time_and_only_meanwhile() -> None:
    before, of_a_thread = os.sched_getscheduler(0), list[int]()
    with prompt_wakeups():
        assert os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR
        other = threading.Thread(target=lambda: of_a_thread.append(os.sched_getscheduler(0)))
        other.start()
        other.join()
    assert of_a_thread == [os.SCHED_OTHER]
    assert os.sched_getscheduler(0) == before

    with pytest.raises(ZeroDivisionError), prompt_wakeups():
        raise ZeroDivisionError
    assert os.sched_getscheduler(0) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="changes the user")
def test_without_the_permission_nothing_fails_and_the_nice_value_stays() -> None:
    command = ["nice", "-n", "5", sys.executable, "-c", UNPRIVILEGED]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )

    assert (done.stderr, done.stdout) == ("", "5\n")
