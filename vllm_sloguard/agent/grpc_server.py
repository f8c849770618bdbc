"""gRPC servers with bounded messages, calls and threads."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from vllm_sloguard.hooks.telemetry_client import unix_target

_MAX_MESSAGE_BYTES = 4 * 2**20
_MAX_CALLS = 64
# Trailing metadata with the controller's own epoch, of a call for another one.
EPOCH_METADATA = "sloguard-epoch"


class _OneLine(logging.Filter):
    """gRPC logs whatever it can't read with a traceback; one line says as much."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            error = " ".join(str(record.exc_info[1]).split())
            record.msg, record.args = "%s: %s", (record.getMessage(), f"{type(record.exc_info[1]).__name__}: {error}")
            record.exc_info = None
        return True


_ONE_LINE = _OneLine()


def bounded_server(*, interceptors: Sequence[grpc.ServerInterceptor] = ()) -> grpc.Server:
    """A gRPC server that listens nowhere yet; messages, calls at once and what is logged of bad ones are bounded."""
    for name in ("grpc._common", "grpc._server"):
        logging.getLogger(name).addFilter(_ONE_LINE)
    # Two servers that share a port would each get half of the calls.
    options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)]
    # A thread for each call that may run at once: engines that wait for live changes hold theirs.
    pool = ThreadPoolExecutor(max_workers=_MAX_CALLS, thread_name_prefix="sloguard-grpc")
    return grpc.server(pool, interceptors=list(interceptors), options=options, maximum_concurrent_rpcs=_MAX_CALLS)


def serve_mutual_tls(
    address: str,
    key: bytes,
    certificate: bytes,
    ca: bytes,
    register: Callable[[grpc.Server], Any],
    *,
    interceptors: Sequence[grpc.ServerInterceptor] = (),
) -> grpc.Server:
    """A started gRPC server at ``address`` for clients with a certificate of ``ca``; ``register`` adds its services.

    Raises OSError if the address is taken.
    """
    credentials = grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)
    server = bounded_server(interceptors=interceptors)
    register(server)
    try:
        server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"{address}: {error}") from None
    server.start()
    return server


def serve_unix_socket(socket: Path, register: Callable[[grpc.Server], Any]) -> grpc.Server:
    """A started gRPC server on ``socket``, readable by nobody else; ``register`` adds its services. Raises OSError."""
    server = bounded_server()
    register(server)
    # gRPC removes the path that it was given when it ends; by then another sidecar's socket may lie there.
    # Its name is as short as possible, since the path of a socket is limited.
    own = socket.with_name(f"{os.getpid():x}")
    own.unlink(missing_ok=True)
    umask = os.umask(0o177)
    try:
        server.add_insecure_port(unix_target(str(own)))
        # The holder of the state folder's lock alone comes here, so a socket that lies there is a dead one's.
        own.replace(socket)
        server.start()
    except RuntimeError as error:
        raise OSError(f"{socket}: {error}") from None
    finally:
        os.umask(umask)
    return server
