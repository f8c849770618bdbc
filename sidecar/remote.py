"""The control service over TCP, where the configuration asks for it: mutual TLS, and a token for whoever gives orders.

On the Unix socket there is neither: who may open it, its owner alone, may do everything.
"""

import hmac
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from sidecar.config import Config, ConfigError, Remote
from sidecar.telemetry import bounded_server
from vllm_sloguard.link import unix_target

_SCHEME = "Bearer "


def serve(remote: Remote, register: Callable[[grpc.Server], Any]) -> grpc.Server:
    """A started server at ``remote.address``; ``register`` adds its services.

    Raises ConfigError for files that can't be used, OSError for an address that is taken.
    """
    credentials = grpc.ssl_server_credentials(
        [(_secret("key", remote.key), _read("certificate", remote.certificate))],
        root_certificates=_read("ca", remote.ca),
        require_client_auth=True,
    )
    server = bounded_server(interceptors=[_TokenNeeded(_token(remote))])
    register(server)
    try:
        server.add_secure_port(remote.address, credentials)
    except RuntimeError as error:
        raise OSError(f"remote.address: {remote.address}: {error}") from None
    server.start()
    return server


@contextmanager
def channel(config: Config) -> Generator[tuple[grpc.Channel, tuple[tuple[str, str], ...]]]:
    """A channel to the sidecar of ``config``, and the metadata that each call needs. Raises ConfigError.

    By the socket in the state folder, or where that is not on this machine, by TCP.
    """
    remote = config.remote
    if remote is None or config.socket.exists():
        with grpc.insecure_channel(unix_target(str(config.socket))) as opened:
            yield opened, ()
        return
    credentials = grpc.ssl_channel_credentials(
        _read("ca", remote.ca), _secret("key", remote.key), _read("certificate", remote.certificate)
    )
    metadata = (("authorization", _SCHEME + _token(remote)),)
    with grpc.secure_channel(remote.address, credentials) as opened:
        yield opened, metadata


class _TokenNeeded(grpc.ServerInterceptor):
    """Refuses every call without the token."""

    def __init__(self, token: str) -> None:
        self._wanted = (_SCHEME + token).encode()

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")
        if hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._wanted):
            return continuation(handler_call_details)
        return grpc.unary_unary_rpc_method_handler(_refuse)  # pyright: ignore[reportUnknownVariableType]


def _refuse(_request: Any, context: grpc.ServicerContext) -> Any:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token is needed")


def _token(remote: Remote) -> str:
    token = _secret("token", remote.token).decode("ascii", errors="replace").strip()
    if len(token) < _SHORTEST_TOKEN or not token.isprintable() or not token.isascii():
        raise ConfigError(f"remote.token: {remote.token}: {_SHORTEST_TOKEN} printable characters or more are needed")
    return token


# `openssl rand -hex 16` gives as many.
_SHORTEST_TOKEN = 32


def _secret(field: str, path: Path) -> bytes:
    content = _read(field, path)
    facts = path.stat()
    # Kubernetes gives a secret to the pod's group.
    if facts.st_uid not in (os.geteuid(), 0) or facts.st_mode & 0o037:
        raise ConfigError(f"remote.{field}: {path} is open to others; chmod 600 it")
    return content


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"remote.{field}: {path}: {error.strerror}") from None
