"""The load client's process on an agent's machine."""

import uuid
from collections import deque

from sidecar.engine.agent_client import AgentClient, AgentLost, AgentRefused, AgentUnknown
from sidecar.engine.agent_engine import AGENT_URL
from sidecar.measure.load_client import LoadError
from vllm_sloguard.starts.load_protocol import EndLoad, GeneratorCommand
from vllm_sloguard.wire import agent_pb2 as pb

_WAIT_S = 0.2
_OWN_FLAGS = ("--base-url", "--model", "--tokenizer")


class AgentGenerator:
    """Loads are sent to engines of the agent; the agent adds their address, model and tokenizer."""

    def __init__(self, client: AgentClient) -> None:
        self._client = client
        self._client_id = ""
        self._read = 0
        self._lines: deque[str] = deque()
        self.log = f"load-client.log of the agent {client.address}"

    def start(self) -> bool:
        """Starts it without waiting, unless it runs; returns whether it was started. Raises AgentLost, AgentRefused."""
        request = pb.PrepareLoadsRequest(controller=self._client.controller)
        found = self._client.call(lambda stub: stub.PrepareLoads, request).client_id
        if found == self._client_id:
            return False
        self._client_id, self._read = found, 0
        self._lines.clear()
        return True

    def send(self, order: GeneratorCommand) -> None:
        """Raises LoadError, AgentLost."""
        request = pb.SendToLoadClientRequest(
            controller=self._client.controller, request_id=uuid.uuid4().hex, client_id=self._client_id
        )
        if isinstance(order, EndLoad):
            request.end.how = order.how
        else:
            engine_id, argv = _without_own_flags(order.argv)
            request.run.engine_id = engine_id
            request.run.argv.extend(argv)
            request.run.request_timeout_seconds = order.request_timeout_s
            request.run.warmup_requests = order.warmup_requests
        try:
            self._client.call(lambda stub: stub.SendToLoadClient, request, 15.0)
        except AgentRefused as error:
            raise LoadError(str(error)) from None

    def poll(self) -> str | None:
        """The next line; empty if there is none yet, None at the end of the stream. Raises AgentLost."""
        if self._lines:
            return self._lines.popleft()
        request = pb.ReadLoadClientRequest(client_id=self._client_id, after=self._read, wait_seconds=_WAIT_S)
        try:
            found = self._client.call(lambda stub: stub.ReadLoadClient, request)
        except AgentUnknown:
            return None
        self._read += len(found.messages)
        self._lines.extend(found.messages)
        if self._lines:
            return self._lines.popleft()
        return None if found.ended else ""

    def close(self) -> None:
        """Ends it, if the agent can be reached."""
        if not self._client_id:
            return
        self._client_id = ""
        try:
            self._client.call(lambda stub: stub.EndLoads, pb.EndLoadsRequest(controller=self._client.controller))
        except (AgentLost, AgentRefused):
            return


def _without_own_flags(argv: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The engine of a load's address, and the other arguments."""
    engine_id, rest = "", list[str]()
    words = iter(argv)
    for word in words:
        if word in _OWN_FLAGS:
            value = next(words, "")
            engine_id = value.removeprefix(AGENT_URL) if word == "--base-url" else engine_id
        else:
            rest.append(word)
    return engine_id, tuple(rest)
