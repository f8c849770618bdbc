"""Receives the plugins' calls from an agent, and answers them from the sidecar's own services."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from sidecar.engine.agent_client import AgentClient
from vllm_sloguard.hooks.telemetry_client import unix_target
from vllm_sloguard.wire import agent_pb2 as pb
from vllm_sloguard.wire.agent_pb2_grpc import AgentServiceStub

_RECONNECT_DELAY_S = 0.5
_MAX_CALLS = 32


class AgentRelay:
    """Keeps the stream of calls open; ``socket`` is the Unix socket that the sidecar's services listen on."""

    def __init__(self, client: AgentClient, socket: Path) -> None:
        self._client = client
        self._own = grpc.insecure_channel(unix_target(str(socket)))
        self._pool = ThreadPoolExecutor(_MAX_CALLS, thread_name_prefix="sloguard-relay")
        self._ended = threading.Event()
        self._answers: queue.SimpleQueue[pb.RelayRequest | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread; to be called once the lease is held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sloguard-relay", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stops the thread."""
        self._ended.set()
        self._answers.put(None)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._own.close()

    def _run(self) -> None:
        while not self._ended.is_set():
            self._answers = queue.SimpleQueue()
            self._answers.put(pb.RelayRequest(controller=self._client.controller))
            try:
                for call in AgentServiceStub(self._client.channel).Relay(self._sent(self._answers)):
                    self._pool.submit(self._answer, call, self._answers)
            except (grpc.RpcError, ValueError, RuntimeError):  # the link is cut, or close() was called
                pass
            self._answers.put(None)
            self._ended.wait(_RECONNECT_DELAY_S)

    @staticmethod
    def _sent(answers: "queue.SimpleQueue[pb.RelayRequest | None]") -> Iterator[pb.RelayRequest]:
        while (answer := answers.get()) is not None:
            yield answer

    def _answer(self, call: pb.RelayResponse, answers: "queue.SimpleQueue[pb.RelayRequest | None]") -> None:
        # Messages are passed on as raw bytes.
        ask: Any = self._own.unary_unary(call.method)  # pyright: ignore[reportUnknownVariableType]
        try:
            answer: bytes = ask(call.request, timeout=call.timeout_seconds)
        except grpc.RpcError as error:
            code = getattr(error, "code", lambda: grpc.StatusCode.UNKNOWN)()
            text = str(getattr(error, "details", str)())
            answers.put(pb.RelayRequest(call=call.call, error_code=int(code.value[0]), error=text[:500]))
        except ValueError:  # close() was called
            return
        else:
            answers.put(pb.RelayRequest(call=call.call, answer=answer))
