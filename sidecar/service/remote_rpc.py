"""The control service over TCP, if configured: mutual TLS plus a bearer token.

The Unix socket needs neither: only its owner can open it.
"""

import hmac
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import grpc

from sidecar.config.schema import Config, Remote
from sidecar.config.secret_files import read_secret, secret, token
from vllm_sloguard.agent.grpc_server import serve_mutual_tls
from vllm_sloguard.hooks.telemetry_client import unix_target

_SCHEME = "Bearer "


def serve_remote(remote: Remote, register: Callable[[grpc.Server], Any]) -> grpc.Server:
    """Starts a server at ``remote.address``; ``register`` adds its services.

    Raises ConfigError for unusable key files, OSError if the address is taken.
    """
    key, certificate = secret("remote.key", remote.key), read_secret("remote.certificate", remote.certificate)
    ca, needed = read_secret("remote.ca", remote.ca), _TokenNeeded(token("remote.token", remote.token))
    try:
        return serve_mutual_tls(remote.address, key, certificate, ca, register, interceptors=[needed])
    except OSError as error:
        raise OSError(f"remote.address: {error}") from None


@contextmanager
def channel(config: Config) -> Generator[tuple[grpc.Channel, tuple[tuple[str, str], ...]]]:
    """A channel to the sidecar of ``config``, and the metadata each call needs. Raises ConfigError.

    Uses the socket in the state folder, or TCP if the socket does not exist on this machine.
    """
    remote = config.remote
    if remote is None or config.socket.exists():
        with grpc.insecure_channel(unix_target(str(config.socket))) as opened:
            yield opened, ()
        return
    credentials = grpc.ssl_channel_credentials(
        read_secret("remote.ca", remote.ca),
        secret("remote.key", remote.key),
        read_secret("remote.certificate", remote.certificate),
    )
    metadata = (("authorization", _SCHEME + token("remote.token", remote.token)),)
    with grpc.secure_channel(remote.address, credentials) as opened:
        yield opened, metadata


class _TokenNeeded(grpc.ServerInterceptor):
    """Rejects calls without the token."""

    def __init__(self, token: str) -> None:
        self._wanted = (_SCHEME + token).encode()

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")
        if hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._wanted):
            return continuation(handler_call_details)
        return grpc.unary_unary_rpc_method_handler(_refuse)  # pyright: ignore[reportUnknownVariableType]


def _refuse(_request: Any, context: grpc.ServicerContext) -> Any:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token is needed")
