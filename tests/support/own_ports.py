"""Ports for the servers of tests: a range per pytest-xdist worker, outside the system's ephemeral ports."""

import itertools
import os

from vllm_sloguard.agent.ports import port_free

# Below those that the system gives to clients, which may take a port between its choice and its use; above the last one
# that Chromium refuses to open. tests/chaos has those from 20000 on.
_FIRST, _A_WORKER = 11_000, 1_000
_first = _FIRST + _A_WORKER * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_numbers = itertools.cycle(range(_A_WORKER))
# Another run of the tests on this machine begins elsewhere.
_offset = os.getpid()


def own_port() -> int:
    """A port that is free on the loopback interface and not reused soon."""
    ports = (_first + (number + _offset) % _A_WORKER for number in _numbers)
    return next(port for port in ports if port_free("127.0.0.1", port))
