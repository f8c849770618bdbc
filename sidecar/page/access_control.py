"""Which requests reach the page: checked before anything else.

A server on the loopback interface can be reached by every web page in every browser of that machine. So unknown names
in the Host header are refused (DNS rebinding), nothing is allowed to other origins, no cookie is set, and an action
needs the token in a header, which makes browsers ask before they send it for another page.
"""

import hmac
from collections.abc import Sequence

from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidecar.format import Say

_SCHEME = b"Bearer "
_MAX_BODY_BYTES = 4096
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


def page_access(app: ASGIApp, token: str | None, hosts: Sequence[str], say: Say) -> ASGIApp:
    """``app`` behind its checks: the Host header, the token of actions, the size of their bodies."""
    bounded = RequestBodyLimitMiddleware(app, max_body_size=_MAX_BODY_BYTES)
    checked = _TokenCheck(bounded, token)
    return _SecurityHeaders(TrustedHostMiddleware(checked, allowed_hosts=hosts, www_redirect=False), say)


class _SecurityHeaders:
    """Adds to every response the headers that it does not set itself.

    An error of the application is reported once, in the sidecar's log.
    """

    def __init__(self, app: ASGIApp, say: Say) -> None:
        self._app = app
        self._say = say
        self._reported = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message["headers"]}
                own = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                added = [header for header in own if header[0] not in known]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            await self._app(scope, receive, with_headers)
        except Exception as error:  # noqa: BLE001 - the boundary of the page: the service continues without it
            text = f"the page: {type(error).__name__}: {error}"
            if text != self._reported:
                self._say(text)
            self._reported = text


class _TokenCheck:
    """Reading is open to all; actions need the token, and are disabled if there is none."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._expected = None if token is None else _SCHEME + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app if scope["method"] in ("GET", "HEAD") else self._refusal(dict(scope["headers"])) or self._app
        await app(scope, receive, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> ASGIApp | None:
        if self._expected is None:
            detail = "actions are only possible where page.host is a loopback address"
            return JSONResponse({"detail": detail}, 403)
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            detail = "a valid token is needed"
            return JSONResponse({"detail": detail}, 401, {"WWW-Authenticate": "Bearer"})
        return None
