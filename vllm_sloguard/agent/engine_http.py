"""Client for vLLM's HTTP server: health, metrics, the served model, completions."""

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

_MAX_ANSWER_BYTES = 4 * 2**20
_IN_ENGINE = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}\n]*\})? ([0-9.e+]+)$", re.MULTILINE)
# Ignores proxy settings: the engine is local.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Unanswered(RuntimeError):  # noqa: N818 - it is an answer about the engine, not an error of ours
    """The engine did not answer, or not as expected."""


def address(host: str, port: int) -> str:
    """The base URL of a server: "http://127.0.0.1:8000", or "http://[::1]:8000"."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def reached_at(host: str) -> str:
    """The address to connect to from this machine for a server bound to ``host``: loopback for a wildcard address."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - where it listens, not we


class EngineHttp:
    """One engine's HTTP interface; an API key is read from VLLM_API_KEY."""

    def __init__(self, host: str, port: int, environment: Mapping[str, str] = os.environ) -> None:
        self.base_url = address(reached_at(host), port)
        self._key = environment.get("VLLM_API_KEY", "")

    def healthy(self, timeout_s: float = 2.0) -> bool:
        """Whether /health succeeds, which does not prove that the engine works."""
        try:
            self.send("/health", None, timeout_s)
        except Unanswered:
            return False
        return True

    def requests_in_engine(self, timeout_s: float = 2.0) -> int | None:
        """Requests running or waiting in all of vLLM's engines; None if vLLM does not report it."""
        try:
            page = self.send("/metrics", None, timeout_s).decode("utf-8", errors="replace")
        except Unanswered:
            return None
        counts = [float(match[1]) for match in _IN_ENGINE.finditer(page)]
        return round(sum(counts)) if counts else None

    def model(self, timeout_s: float = 10.0) -> str:
        """The name under which the model is served. Raises Unanswered."""
        return str(self._json("/v1/models", None, timeout_s, lambda answer: answer["data"][0]["id"]))

    def complete(self, prompt: str, max_tokens: int, timeout_s: float) -> str:
        """One completion. Raises Unanswered, also if it was aborted."""
        body = {"model": self.model(timeout_s), "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        text, reason = self._json(
            "/v1/completions",
            body,
            timeout_s,
            lambda answer: (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]),
        )
        if reason not in ("stop", "length"):
            raise Unanswered(f"the completion ended with {reason!r}")
        return str(text)

    def _json(self, path: str, body: dict[str, Any] | None, timeout_s: float, read: Callable[[Any], Any]) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            return read(json.loads(self.send(path, data, timeout_s)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Unanswered(f"{path}: not the answer of vLLM: {error}") from None

    def send(self, path: str, data: bytes | None, timeout_s: float) -> bytes:
        """The answer to a GET, or to a POST of ``data``. Raises Unanswered."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.base_url + path, data=data, headers=headers)  # noqa: S310 - http, above
        try:
            with _DIRECT.open(request, timeout=timeout_s) as response:
                answer = response.read(_MAX_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            raise Unanswered(f"{path}: status {error.code}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Unanswered(f"{path}: {error}") from None
        if len(answer) > _MAX_ANSWER_BYTES:
            raise Unanswered(f"{path}: more than {_MAX_ANSWER_BYTES} bytes")
        return answer
