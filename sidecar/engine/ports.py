"""Free TCP ports, and who owns the taken ones."""

import random
import socket
from contextlib import suppress
from pathlib import Path

import psutil

_OWN_PORTS = 8_000


def port_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def port_owner(port: int) -> str:
    """Who listens there, as the end of a sentence; empty where the system does not tell."""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr[1] == port and connection.status == psutil.CONN_LISTEN:
                return f", by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def first_given_port() -> int:
    """The lowest port that the system gives to clients, and to who asks for any: Linux's own default where unknown."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return 32_768


def any_free_port(host: str = "127.0.0.1", below: int | None = None) -> int:
    """A port that is free now, ``below`` those that the system gives away: a start takes long to listen there.

    Where the system gives all of them away, or none is free, it is one of the system's. Raises OSError without any.
    """
    end = first_given_port() if below is None else below
    ports = range(max(end - _OWN_PORTS, 1_024), end)
    for port in random.sample(ports, len(ports)):
        if port_free(host, port):
            return port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
