"""Finds free TCP ports, and the process that listens on a taken one."""

import ipaddress
import os
import random
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
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
    """The listening process, as a clause to append to a sentence; empty if unknown."""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr[1] == port and connection.status == psutil.CONN_LISTEN:
                return f", by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


_LISTEN = "0A"  # linux/include/net/tcp_states.h


@dataclass(frozen=True)
class PortListeners:
    """Who listens on a port: the given processes, others, or both (SO_REUSEPORT)."""

    own: bool
    foreign: bool


def listeners(host: str, port: int, pids: Iterable[int]) -> PortListeners | None:
    """Whether ``pids`` listen on ``host:port``, and whether any other process does; None if it can't be determined.

    Reads the sockets in /proc/net rather than probing the port, where another server could answer.
    """
    sockets = _listening(host, port)
    own: set[int] = set()
    try:
        for pid in pids:
            own |= _sockets_of(pid)
    except PermissionError:
        return None
    return None if sockets is None else PortListeners(own=bool(sockets & own), foreign=bool(sockets - own))


def _listening(host: str, port: int) -> set[int] | None:
    """The inodes of the sockets that listen there; None if /proc/net can't be read."""
    found: set[int] = set()
    try:
        for name in ("tcp", "tcp6"):
            path = Path("/proc/net") / name
            for line in path.read_text(encoding="ascii").splitlines()[1:] if path.exists() else ():
                words = line.split()
                local, state, inode = words[1], words[3], words[9]
                raw, number = local.split(":")
                if state == _LISTEN and int(number, 16) == port and _overlap(host, _address(raw)):
                    found.add(int(inode))
    except (OSError, ValueError, IndexError):
        return None
    return found


def _address(raw: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Parses an address from /proc/net: hexadecimal 32-bit words in host byte order."""
    words = [int(raw[at : at + 8], 16) for at in range(0, len(raw), 8)]
    return ipaddress.ip_address(b"".join(struct.pack("=I", word) for word in words))


def _overlap(host: str, listening: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether connections to ``host`` may reach a socket bound to ``listening``."""
    try:
        wanted = ipaddress.ip_address(host)
    except ValueError:  # a name
        return True
    return wanted == listening or wanted.is_unspecified or listening.is_unspecified


def _sockets_of(pid: int) -> set[int]:
    """The inodes of a process's sockets. Raises PermissionError."""
    found: set[int] = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError, ValueError):
                target = str(Path(entry.path).readlink())
                if target.startswith("socket:["):
                    found.add(int(target[8:-1]))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def first_ephemeral_port() -> int:
    """The start of the ephemeral port range; Linux's default if unknown."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return 32_768


def any_free_port(host: str = "127.0.0.1", below: int | None = None) -> int:
    """A free port ``below`` the ephemeral range, so that no client takes it while an engine is starting up.

    Falls back to an ephemeral port if there is no range below, or no free port in it. Raises OSError if none is free.
    """
    end = first_ephemeral_port() if below is None else below
    ports = range(max(end - _OWN_PORTS, 1_024), end)
    for port in random.sample(ports, len(ports)):
        if port_free(host, port):
            return port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
