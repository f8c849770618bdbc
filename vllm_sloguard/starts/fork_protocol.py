"""The messages between the sidecar and the fork server: one JSON object a line, its type under "message".

The sidecar sends ForkRequest and DetachRequest. The server sends ServerReady or Unusable once, answers each request
with ForkedEngine, Detached or Unusable, and sends Exited when an engine's first process has ended.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias


class ForkProtocolError(ValueError):
    """A line that is no message of this protocol; the text says what it was."""


@dataclass(frozen=True)
class ServerUsage:
    """What grows where engines leave something behind in the server."""

    descriptors: int
    threads: int
    resident_bytes: int


@dataclass(frozen=True)
class ForkRequest:
    """Fork an engine that runs ``python -m module argv`` in ``folder``, its output appended to ``log``."""

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
    """The server can fork; its imports took ``seconds``."""

    vllm: str
    seconds: float
    usage: ServerUsage


@dataclass(frozen=True)
class Unusable:
    """Nothing can be forked, because of ``reason``."""

    reason: str


@dataclass(frozen=True)
class ForkedEngine:
    """The first process of the engine."""

    pid: int
    usage: ServerUsage


@dataclass(frozen=True)
class Detached:
    """The engine ``pid`` outlives the server."""

    pid: int


@dataclass(frozen=True)
class Exited:
    """The engine's first process ended with ``code``, negative for a signal."""

    pid: int
    code: int


Request: TypeAlias = ForkRequest | DetachRequest
Answer: TypeAlias = ServerReady | Unusable | ForkedEngine | Detached | Exited
_MESSAGES: Mapping[str, type] = {
    kind.__name__: kind for kind in (ForkRequest, DetachRequest, ServerReady, Unusable, ForkedEngine, Detached, Exited)
}


def encode_message(message: Request | Answer) -> bytes:
    """The line of ``message``."""
    return json.dumps({"message": type(message).__name__, **asdict(message)}).encode() + b"\n"


def decode_request(line: bytes) -> Request:
    """The request in ``line``. Raises ForkProtocolError."""
    message = _decode(line)
    if not isinstance(message, ForkRequest | DetachRequest):
        raise ForkProtocolError(f"not a request: {line[:200]!r}")
    return message


def decode_answer(line: bytes) -> Answer:
    """The answer in ``line``. Raises ForkProtocolError."""
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
