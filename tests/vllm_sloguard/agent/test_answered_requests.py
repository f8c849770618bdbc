"""Repeated requests are made once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_sloguard.agent.answered_requests import AnsweredRequests


def test_a_repetition_gets_the_first_answer_even_while_the_first_is_under_way() -> None:
    answered, calls, go = AnsweredRequests(), list[int](), threading.Event()

    def call() -> int:
        go.wait(10)
        calls.append(1)
        return len(calls)

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(answered.once, "a", call) for _ in range(4)]
        time.sleep(0.05)
        go.set()
        assert [future.result(10) for future in futures] == [1, 1, 1, 1]
    assert answered.once("b", call) == 2


def test_a_request_that_failed_may_be_sent_again() -> None:
    answered = AnsweredRequests()

    def fail() -> int:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        answered.once("a", fail)
    assert answered.once("a", lambda: 1) == 1
