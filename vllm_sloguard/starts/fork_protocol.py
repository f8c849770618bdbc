"""Messages between the sidecar and the fork server: one JSON object per line, with its type under "message".

The sidecar sends ForkRequest and DetachRequest. The server first sends ServerReady or Unusable, answers each request
with ForkedEngine, Detached or Unusable, and sends Exited when an engine's first process has exited.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias


class ForkProtocolError(ValueError):
    """A line that is not a message of this protocol."""


@dataclass(frozen=True)
class ServerUsage:
    """Resources of the server that would grow if engines leaked."""

    descriptors: int
    threads: int
    resident_bytes: int


@dataclass(frozen=True)
class ForkRequest:
    """Fork an engine that runs ``python -m module argv`` in ``folder`` and appends its output to ``log``."""

    module: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    log: str
    folder: str


@dataclass(frozen=True)
class DetachRequest:
    """Let the engine ``pid`` outlive the server."""

    pid: int


@dataclass(frozen=True)
class ServerReady:
    """The server is ready to fork; its imports took ``seconds``."""

    vllm: str
    seconds: float
    usage: ServerUsage


@dataclass(frozen=True)
class Unusable:
    """The server cannot fork, because of ``reason``."""

    reason: str


@dataclass(frozen=True)
class ForkedEngine:
    """The engine was forked; this is its first process."""

    pid: int
    usage: ServerUsage


@dataclass(frozen=True)
class Detached:
    """The engine ``pid`` will outlive the server."""

    pid: int


@dataclass(frozen=True)
class Exited:
    """The engine's first process exited with ``code``, negative for a signal."""

    pid: int
    code: int


Request: TypeAlias = ForkRequest | DetachRequest
Answer: TypeAlias = ServerReady | Unusable | ForkedEngine | Detached | Exited
_MESSAGES: Mapping[str, type] = {
    kind.__name__: kind for kind in (ForkRequest, DetachRequest, ServerReady, Unusable, ForkedEngine, Detached, Exited)
}


def encode_message(message: Request | Answer) -> bytes:
    """Encodes ``message`` as a line."""
    return json.dumps({"message": type(message).__name__, **asdict(message)}).encode() + b"\n"


def decode_request(line: bytes) -> Request:
    """Decodes a request. Raises ForkProtocolError."""
    message = _decode(line)
    if not isinstance(message, ForkRequest | DetachRequest):
        raise ForkProtocolError(f"not a request: {line[:200]!r}")
    return message


def decode_answer(line: bytes) -> Answer:
    """Decodes an answer. Raises ForkProtocolError."""
    message = _decode(line)
    if isinstance(message, ForkRequest | DetachRequest):
        raise ForkProtocolError(f"not an answer: {line[:200]!r}")
    return message


def _decode(line: bytes) -> Request | Answer:
    try:
        content: dict[str, Any] = json.loads(line)
        kind = _MESSAGES[content.pop("message")]
        if "usage" in content:
            content["usage"] = ServerUsage(**content["usage"])
        if "argv" in content:
            content["argv"] = tuple(content["argv"])
        return kind(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ForkProtocolError(f"not a message of the fork server: {line[:200]!r}: {error}") from None
