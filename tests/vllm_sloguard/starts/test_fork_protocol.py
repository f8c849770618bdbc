"""The fork server's messages survive encoding, and invalid lines are rejected with a one-line error."""

import pytest

from vllm_sloguard.starts.fork_protocol import (
    Answer,
    Detached,
    DetachRequest,
    Exited,
    ForkedEngine,
    ForkProtocolError,
    ForkRequest,
    ServerReady,
    ServerUsage,
    Unusable,
    decode_answer,
    decode_request,
    encode_message,
)

USAGE = ServerUsage(12, 1, 2**30)


@pytest.mark.parametrize(
    "answer",
    [ServerReady("0.32.0", 1.5, USAGE), Unusable("a thread"), ForkedEngine(7, USAGE), Detached(7), Exited(7, -9)],
)
def test_an_answer_comes_back_as_it_was(answer: Answer) -> None:
    assert decode_answer(encode_message(answer)) == answer


def test_a_request_comes_back_as_it_was() -> None:
    request = ForkRequest("vllm", ("serve", "a b"), {"A": "ä\n"}, "/log", "/folder")
    assert decode_request(encode_message(request)) == request
    assert decode_request(encode_message(DetachRequest(3))) == DetachRequest(3)


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b'{"message": "Other"}', b'{"message": "ServerReady"}', b"\xff"])
def test_other_lines_are_refused(line: bytes) -> None:
    with pytest.raises(ForkProtocolError, match="not a message of the fork server"):
        decode_answer(line)


def test_an_answer_is_no_request() -> None:
    with pytest.raises(ForkProtocolError, match="not a request"):
        decode_request(encode_message(Detached(3)))
