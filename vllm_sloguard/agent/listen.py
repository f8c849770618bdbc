"""Where the agent listens: a private Unix socket, or TCP with mutual TLS."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from vllm_sloguard.agent.grpc_server import serve_mutual_tls, serve_unix_socket
from vllm_sloguard.agent.private_files import accessible_to_others

_UNIX = "unix://"
_TCP = re.compile(r"(?:[^\s:/]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}")
LONGEST_SOCKET_PATH_BYTES = 107


class AddressError(ValueError):
    """An address can't be used; the text says why, without the address."""


class TlsFileError(ValueError):
    """A file for TLS can't be used; one line that names the field."""


@dataclass(frozen=True)
class AgentAddress:
    """``unix:///path`` or ``host:port``; exactly one of ``socket`` and ``target`` is set."""

    text: str
    socket: Path | None = None
    target: str = ""


@dataclass(frozen=True)
class TlsFiles:
    """A certificate with its key, and the authority that signs the other side's."""

    certificate: Path
    key: Path
    ca: Path


def read_address(text: str) -> AgentAddress:
    """Raises AddressError, whose text does not repeat ``text``."""
    if text.startswith(_UNIX):
        path = Path(text.removeprefix(_UNIX))
        if not path.is_absolute() or len(os.fsencode(path)) > LONGEST_SOCKET_PATH_BYTES:
            raise AddressError(f"an absolute path of at most {LONGEST_SOCKET_PATH_BYTES} bytes is needed after unix://")
        return AgentAddress(text, socket=path)
    if not _TCP.fullmatch(text):
        raise AddressError("unix:///a/path or host:port is needed, such as unix:///run/sloguard/agent.sock")
    return AgentAddress(text, target=text)


def listen(address: AgentAddress, tls: TlsFiles | None, register: Callable[[grpc.Server], Any]) -> grpc.Server:
    """A started server; ``register`` adds its services. Raises TlsFileError, OSError if the address is taken."""
    if address.socket is not None:
        return serve_unix_socket(address.socket, register)
    assert tls is not None  # read_options has checked it
    key, certificate, ca = (
        private_file("--key", tls.key),
        tls_file("--certificate", tls.certificate),
        tls_file("--ca", tls.ca),
    )
    return serve_mutual_tls(address.target, key, certificate, ca, register)


def tls_file(field: str, path: Path) -> bytes:
    """The content of a file of TLS. Raises TlsFileError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsFileError(f"{field}: {path}: {error.strerror}") from None


def private_file(field: str, path: Path) -> bytes:
    """The same for a file that must not be accessible to others. Raises TlsFileError."""
    content = tls_file(field, path)
    if accessible_to_others(path):
        raise TlsFileError(f"{field}: {path} is accessible to others; chmod 600 it")
    return content
