"""Faults of clients, and of engines that write or report too much."""

import random
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from faults import ANSWER_S, GRACE_S, WITH_ENGINE, Fault, core_killed, engine_killed
from outside_faults import SLOW
from rig import Rig, Settings

from sidecar.engine.log_bounds import MAX_LOG_BYTES

_VIEWERS = 128
# The engine writes this much a second while ``flood`` is there; see tests/support/fake_vllm.py.
_FLOOD_S = 4.0
_BOUNDED_S = 5.0
# Sends completions to port argv[1] and closes each connection before the answer, or in the middle of the request.
CUT = """
import random, socket, sys, time
body = b'{"model": "fake", "prompt": "a b c", "max_tokens": 4}'
request = b"POST /v1/completions HTTP/1.1\\r\\nHost: h\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body
while True:
    try:
        with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 2) as client:
            client.sendall(request[: random.choice((40, len(request) - 5, len(request)))])
            time.sleep(random.uniform(0, 0.03))
    except OSError:
        time.sleep(0.1)
"""


def requests_cut(rig: Rig, rng: random.Random) -> list[str]:
    """Users cut their requests, until the end of the run."""
    for _ in range(3):
        rig.bystander(sys.executable, "-c", CUT, str(rig.port))
    time.sleep(rng.uniform(1, 3))
    if rng.random() < 0.5:
        engine_killed(rig)
    return []


def silent_viewers(rig: Rig, rng: random.Random) -> list[str]:
    """Twice as many connections to the page as it allows, none of which asks anything; then the engine is killed."""
    done = rig.folder / "connected"
    rig.bystander(sys.executable, "-c", SLOW, str(rig.page_port), str(_VIEWERS), str(done))
    if not rig.await_true(done.exists, GRACE_S) or not rig.await_serving(GRACE_S):
        return ["it does not serve while viewers are silent"]
    time.sleep(rng.uniform(0, 2))
    wrong = [] if _page_answers(rig) else [f"the page did not answer within {ANSWER_S:g} s"]
    engine_killed(rig)
    return wrong


def busy_telemetry(rig: Rig, rng: random.Random) -> list[str]:
    """The core is killed while the engine reports 500 requests a second."""
    time.sleep(rng.uniform(0, 2))
    return core_killed(rig, rng)


def log_flooded(rig: Rig, rng: random.Random) -> list[str]:
    """The engine writes its log without end for a while."""
    flood = rig.fake / "flood"
    flood.touch()
    time.sleep(_FLOOD_S + rng.uniform(0, 1))
    flood.unlink()
    logs = rig.state / "logs"
    if rig.await_true(lambda: max(map(_occupied, logs.glob("*.log")), default=0) <= MAX_LOG_BYTES, _BOUNDED_S):
        return []
    return [f"logs occupy {[_occupied(log) >> 20 for log in logs.glob('*.log')]} MiB"]


def _occupied(log: Path) -> int:
    try:
        return log.stat().st_blocks * 512
    except OSError:
        return 0


def _page_answers(rig: Rig) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{rig.page_port}/api/view", timeout=ANSWER_S) as page:
            return page.status == 200
    except (OSError, urllib.error.URLError):
        return False


CLIENTS = (
    Fault("requests cut", "clients that give up", ("serving", "draining", "tuning"), requests_cut),
    Fault(
        "silent viewers",
        "silent clients of the page",
        ("serving", "tuning"),
        silent_viewers,
        Settings(page=True),
        quick=True,
    ),
    Fault("busy telemetry", "500 requests/s of telemetry", WITH_ENGINE, busy_telemetry, Settings(traffic=500.0)),
    Fault("log flooded", "logs without end", ("serving",), log_flooded, spares_engine=True),
)
