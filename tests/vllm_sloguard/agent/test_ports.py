"""Finding a port's listener in /proc/net."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vllm_sloguard.agent.ports import PortListeners, any_free_port, listeners

LISTEN = """
import socket, sys
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
server.bind(("", 0))
server.listen()
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other() -> Iterator[tuple[int, int]]:
    """Another process that listens on all addresses: its pid and port."""
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.kill()


def test_a_free_port_has_no_listener() -> None:
    assert listeners("127.0.0.1", any_free_port(), [os.getpid()]) == PortListeners(own=False, foreign=False)


def test_a_server_of_another_process_is_foreign(other: tuple[int, int]) -> None:
    pid, port = other

    assert listeners("127.0.0.1", port, [os.getpid()]) == PortListeners(own=False, foreign=True)
    assert listeners("127.0.0.1", port, [pid]) == PortListeners(own=True, foreign=False)
    assert listeners("localhost", port, [pid]) == PortListeners(own=True, foreign=False)


def test_two_servers_that_share_a_port_are_both_seen(other: tuple[int, int]) -> None:
    pid, port = other
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", port))
        server.listen()

        assert listeners("127.0.0.1", port, [pid]) == PortListeners(own=True, foreign=True)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_addresses_of_the_sixth_version_are_read() -> None:
    with socket.socket(socket.AF_INET6) as server:
        try:
            server.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        server.listen()
        port = server.getsockname()[1]

        assert listeners("::1", port, [os.getpid()]) == PortListeners(own=True, foreign=False)
        assert listeners("127.0.0.1", port, [os.getpid()]) == PortListeners(own=False, foreign=False)
