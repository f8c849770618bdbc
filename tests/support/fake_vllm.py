#!/usr/bin/env python3
"""Stands in for the Python of vLLM's environment, for faults and speed: a real process, started as vLLM is.

``engine.python`` names this file. Started as the API server it answers vLLM's HTTP; started as the load client it
answers the client's protocol, with latencies that follow from the engine's max_num_seqs. Numbers of sequences that
mean more: 13 runs out of memory at its start, 17 hangs once it is up, 19 dies under its first load with code 0.
"""

import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

OUT_OF_MEMORY, HANGS, DIES = 13, 17, 19
OOM_TEXT = (
    "(EngineCore pid=1) ERROR 11-22 05:14:16 [core.py:1510] torch.OutOfMemoryError: CUDA out of memory. "
    "Tried to allocate 2.00 GiB.\nRuntimeError: Engine core initialization failed. See root cause above."
)


class Engine(BaseHTTPRequestHandler):
    """vLLM's HTTP, as far as the sidecar uses it."""

    max_num_seqs = 0
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Health, the model's name, and what the load client asks."""
        if self.path == "/load":
            if self.max_num_seqs == DIES:
                os._exit(0)
            self._answer({"max_num_seqs": self.max_num_seqs})
        elif self.path == "/v1/models":
            self._answer({"data": [{"id": "fake"}]})
        else:
            self._answer({})

    def do_POST(self) -> None:
        """A completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.max_num_seqs == HANGS:
            time.sleep(600)
        time.sleep(body.get("seconds", 0))
        self._answer({"choices": [{"text": "b" * body["max_tokens"], "finish_reason": "length"}]})

    def _answer(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def serve(argv: list[str]) -> int:
    """The API server."""
    flags = dict(pairwise(argv))
    Engine.max_num_seqs = int(flags["--max-num-seqs"])
    if Engine.max_num_seqs == OUT_OF_MEMORY:
        print(OOM_TEXT, flush=True)
        return 0
    server = ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Engine)
    print(f"serving with {Engine.max_num_seqs}", flush=True)
    server.serve_forever()
    return 0


def send_loads() -> int:
    """The load client: more sequences are faster, and the spread of the requests is always the same."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        argv = json.loads(line)["argv"]
        flags = dict(pairwise(argv))
        count = int(flags["--num-prompts"])
        try:
            with urllib.request.urlopen(f"{flags['--base-url']}/load", timeout=5) as response:
                mean_s = 0.4 / json.loads(response.read())["max_num_seqs"]
            time.sleep(float(os.environ.get("FAKE_LOAD_S", "0.1")))
            errors = [""] * count
        except (OSError, urllib.error.URLError) as error:
            mean_s, errors = 0.1, [str(error)] * count
        ttfts = [mean_s * (0.9 + 0.2 * i / count) for i in range(count)]
        result = {"ttfts": ttfts, "latencies": [t * 2 for t in ttfts], "itls": [[0.01]] * count, "errors": errors}
        print(json.dumps({"result": {**result, "duration": 1.0}}), flush=True)
    return 0


def main() -> int:
    """As which of vLLM's programs it was started."""
    argv = sys.argv[1:]
    if "-c" in argv:
        return 1  # no distribution is named vllm, as with the CPU build
    if argv[:2] == ["-m", "vllm_sloguard.loadgen"]:
        return send_loads()
    if "vllm_sloguard.fork_server" in argv:
        os.write(0, json.dumps({"unusable": "there is no vLLM to import"}).encode() + b"\n")
        return 0
    threading.stack_size(256 * 1024)
    return serve(argv)


if __name__ == "__main__":
    sys.exit(main())
