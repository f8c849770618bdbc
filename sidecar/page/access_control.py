"""Who may ask what: checked before anything else looks at a request.

A server on the loopback interface is within reach of every page in every browser of that machine. So a foreign name in
the Host header is refused (DNS rebinding), nothing is allowed to other origins, no cookie is set, and an order needs
the token in a header, which makes browsers ask before they send it for another page.
"""

import hmac
import ipaddress
import json
import re
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidecar.format import Say

_SCHEME = b"Bearer "
_MOST_BODY_BYTES = 4096
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


def known_host(header: str, names: Sequence[str]) -> bool:
    """Whether a Host header is an address, which no name can be rebound to, this machine, or one of ``names``."""
    match = _HOST.fullmatch(header)
    if match is None:
        return False
    name = match["name"].strip("[]").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name in (known.lower() for known in names)
    return True


class Gate:
    """Wraps the application; what that fails of is said once, and never reaches the server."""

    def __init__(self, app: ASGIApp, token: str | None, names: Sequence[str], say: Say) -> None:
        self._app = app
        self._wanted = None if token is None else _SCHEME + token.encode()
        self._names = tuple(names)
        self._say = say
        self._trouble = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        if refused := self._refusal(scope["method"], headers):
            await _refuse(*refused, with_headers)
            return
        try:
            await self._app(scope, receive, with_headers)
        except Exception as error:  # noqa: BLE001 - the boundary of the page: the service goes on without it
            text = f"the page: {type(error).__name__}: {error}"
            if text != self._trouble:
                self._say(text)
            self._trouble = text

    def _refusal(self, method: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        if not known_host(headers.get(b"host", b"").decode("latin-1"), self._names):
            return 421, "this is not a name of this page: page.hosts lists those besides localhost and addresses"
        if method in ("GET", "HEAD"):
            return None
        if self._wanted is None:
            return 403, "the page takes orders on this machine alone: page.host is no loopback address"
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._wanted):
            return 401, "the token is needed, and this is not it"
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or int(length) > _MOST_BODY_BYTES:
            return 413, f"a body of at most {_MOST_BODY_BYTES} bytes is needed"
        return None


async def _refuse(status: int, text: str, send: Send) -> None:
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
