"""Makes calls idempotent: a repeated request id gets the first call's answer."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

AnsweredT = TypeVar("AnsweredT")

_MAX_KEPT = 512


class AnsweredRequests:
    """The answers to the last requests; a request that failed may be sent again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, Future[Any]] = OrderedDict()

    def once(self, request_id: str, call: Callable[[], AnsweredT]) -> AnsweredT:
        """The result of ``call``, which is made once per ``request_id``; a repetition waits for the first one."""
        with self._lock:
            future = self._answers.get(request_id)
            first = future is None
            if future is None:
                future = self._answers[request_id] = Future()
                while len(self._answers) > _MAX_KEPT:
                    self._answers.popitem(last=False)
        if first:
            try:
                future.set_result(call())
            except BaseException as error:
                with self._lock:
                    self._answers.pop(request_id, None)
                future.set_exception(error)
                raise
        return future.result()
