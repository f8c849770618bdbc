"""An engine that streams, in a thread: the HTTP of a completion, with seats, a step time, and faults on request."""

import asyncio
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web


@dataclass
class StreamingEngine:
    """``seats`` requests run at once, each a token every ``step_s``; the first ``cold`` ones take ten times as long."""

    seats: int = 8
    step_s: float = 0.005
    cold: int = 0
    short: int = 0  # every so-manieth request is answered with one token less
    url: str = ""
    arrived: int = 0
    running: int = 0
    answered: int = 0
    aborted: int = 0
    prompts: list[str] = field(default_factory=list[str])

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """One completion, as vLLM streams it; every one that arrives is in the end answered or aborted."""
        self.arrived += 1
        try:
            response = await self._complete(request, slow=10 if self.arrived <= self.cold else 1)
        except (asyncio.CancelledError, ConnectionResetError):
            self.aborted += 1
            raise
        self.answered += 1
        return response

    async def _complete(self, request: web.Request, slow: int) -> web.StreamResponse:
        short = 1 if self.short and self.arrived % self.short == 0 else 0
        body = await request.json()
        self.prompts.append(body["prompt"])
        tokens = body["max_tokens"] - short
        response = web.StreamResponse()
        await response.prepare(request)
        async with self._seats:
            self.running += 1
            try:
                for _ in range(tokens):
                    await asyncio.sleep(self.step_s * slow)
                    await _write(response, {"choices": [{"text": "a"}]})
            finally:
                self.running -= 1
        await _write(response, {"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": tokens}})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def serve(self, up: threading.Event, stop: asyncio.Event) -> None:
        """Until ``stop``."""
        self._seats = asyncio.Semaphore(self.seats)
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        up.set()
        await stop.wait()
        await runner.cleanup()


@contextmanager
def serving(engine: StreamingEngine) -> Generator[StreamingEngine]:
    """``engine`` while it serves."""
    loop, up, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(engine.serve(up, stop),))
    thread.start()
    try:
        assert up.wait(60)
        yield engine
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


async def _write(response: web.StreamResponse, content: dict[str, object]) -> None:
    await response.write(f"data: {json.dumps(content)}\n\n".encode())
