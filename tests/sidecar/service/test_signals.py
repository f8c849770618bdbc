"""Signals reach the sidecar's loop at any moment."""

import signal
import subprocess
import sys
import time

import pytest

# Spends nearly all its time inside the event's lock, where a handler that takes the lock would deadlock.
LOOP = """
import time
from sidecar.service.mailbox import Mailbox
from sidecar.service.signals import stop_on

requests = Mailbox()
stop_on(requests)
print("ready", flush=True)
end = time.monotonic() + 3
while time.monotonic() < end:
    requests.stop_sidecar.wait(1e-6)
    requests.stop_sidecar.clear()
requests.stop_sidecar.wait(60)
print(requests.stop_sidecar.is_set(), requests.stop_engine.is_set(), flush=True)
"""


@pytest.mark.parametrize(("number", "stops_engine"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_signals_find_the_loop_at_any_moment(number: signal.Signals, stops_engine: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, text=True) as loop:
        assert loop.stdout is not None
        assert loop.stdout.readline() == "ready\n"
        try:
            began = time.monotonic()
            while time.monotonic() < began + 4:
                loop.send_signal(number)
                time.sleep(0.0005)
            assert loop.communicate(timeout=60)[0] == f"True {stops_engine}\n"
        finally:
            loop.kill()
