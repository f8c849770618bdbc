#!/usr/bin/env python3
"""An engine that streams completions while processes of it spin on every core, as vLLM's do on a small machine.

    spinning_engine.py PORT SPINNING STEP_S

``SPINNING`` processes never sleep; each request gets a token every ``STEP_S``.
"""

import asyncio
import ctypes
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def spin() -> None:
    """Forks a process that never sleeps."""
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        while True:
            pass


def _chunk(content: object) -> bytes:
    text = b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(text), text)


async def main(port: int, step_s: float) -> None:
    """Serves for ever."""
    # As long as vLLM's.
    token = _chunk(
        {
            "id": "cmpl-b0b3b8a5d0a74c3a9d6d1d9c2e6f7a81",
            "object": "text_completion",
            "created": 1795912205,
            "model": "a/model",
            "choices": [{"index": 0, "text": " a", "logprobs": None, "finish_reason": None, "stop_reason": None}],
            "usage": None,
        }
    )

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            tokens = json.loads(await reader.readexactly(int(length.split(b":")[1])))["max_tokens"]
            writer.write(_HEAD)
            for _ in range(tokens):
                await asyncio.sleep(step_s)
                writer.write(token)
            writer.write(_chunk({"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": tokens}}))
            writer.write(b"0\r\n\r\n")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    for _ in range(int(sys.argv[2])):
        spin()
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[3])))
