"""The HTTP routes of the page: its files, the view as JSON and as events, the report, the history, and the actions."""

import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from sidecar.config.schema import Config
from sidecar.page.actions import Action, ActionName, ActionRefused, perform
from sidecar.page.documents import Document, Documents
from sidecar.page.event_stream import Feed

MAX_STREAMS = 16
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_NAMES = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css", "/icon.svg": "icon.svg"}

# The report has its scripts in it. Sandboxed, it is of another origin, and can't act in the page's name.
_REPORT_CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:;"
    " sandbox allow-scripts allow-modals; frame-ancestors 'none'"
)

Files = Mapping[str, bytes]


def static_files() -> Files:
    """The page's files by name, read once, so that they match the running version."""
    folder = files("sidecar.page").joinpath("static")
    return {name: folder.joinpath(name).read_bytes() for name in _NAMES.values()}


def version_of(static: Files) -> str:
    """A digest of the files."""
    return hashlib.sha256(b"\0".join(static[name] for name in sorted(static))).hexdigest()[:12]


class _Stream(StreamingResponse):
    """One viewer's stream; beyond the limit the response is 503."""

    def __init__(self, feed: Feed) -> None:
        super().__init__(feed.events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._feed.viewers >= MAX_STREAMS:
            busy = JSONResponse({"detail": f"{MAX_STREAMS} viewers already"}, 503, headers={"Retry-After": "10"})
            await busy(scope, receive, send)
            return
        self._feed.viewers += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._feed.viewers -= 1


def _answer(document: Document, media_type: str, headers: dict[str, str]) -> Response:
    if document.problem:
        return Response(document.problem, 404, media_type="text/plain")
    return Response(document.content, media_type=media_type, headers=headers)


def _add_documents(app: FastAPI, documents: Documents) -> None:
    @app.get("/report")
    async def report() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _answer(await run_in_threadpool(documents.report), "text/html", {"Content-Security-Policy": _REPORT_CSP})

    @app.get("/history")
    async def history() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _answer(await run_in_threadpool(documents.history), "text/plain", {})


def page_application(config: Config, feed: Feed, static: Files) -> FastAPI:
    """The routes; sidecar.page.access_control belongs in front of them."""
    app = FastAPI(openapi_url=None)

    def add(path: str, name: str) -> None:
        media_type = _TYPES[name.rpartition(".")[2]]

        async def send() -> Response:
            return Response(static[name], media_type=media_type)

        app.get(path)(send)

    for path, name in _NAMES.items():
        add(path, name)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:  # pyright: ignore[reportUnusedFunction]
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"][1:]) or "the action"
        return JSONResponse({"detail": f"{place}: {problem['msg']}"}, 422)

    @app.get("/api/view")
    async def view() -> Response:  # pyright: ignore[reportUnusedFunction]
        feed.refresh()
        body = b'{"view": %s, "heartbeat": %s}' % (feed.view, feed.heartbeat)
        return Response(body, media_type="application/json")

    @app.get("/api/events")
    async def events() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _Stream(feed)

    _add_documents(app, Documents(config.state))

    @app.post("/api/{name}")
    async def act(name: ActionName, action: Action) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        try:
            message = await run_in_threadpool(perform, config, name, action)
        except ActionRefused as error:
            raise HTTPException(409, str(error)) from None
        feed.refresh_soon()
        return {"message": message}

    return app
