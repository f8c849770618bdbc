"""The load protocol: each end decodes what the other encodes, and rejects anything else."""

import json
import math

import pytest
from pydantic import TypeAdapter, ValidationError

from vllm_sloguard.starts.load_protocol import (
    End,
    EndLoad,
    GeneratorCommand,
    GeneratorMessage,
    InFlight,
    LoadDelta,
    LoadFailure,
    LoadReport,
    Ready,
    RequestResult,
    RunLoad,
    WarmUp,
    command_from_json,
    message_line,
)

ANSWERED = RequestResult(0.1, 0.5, (0.2, 0.2), "", 12.5, 12.49)
FAILED = RequestResult(None, None, (), "no answer within 60 s", 13.0, 13.0)
MESSAGES: TypeAdapter[GeneratorMessage] = TypeAdapter(GeneratorMessage)


@pytest.mark.parametrize("order", [RunLoad(("--model", "m"), 60.0, 8), EndLoad(End.STOP), EndLoad(End.ENOUGH)])
def test_orders_arrive_as_they_were_sent(order: GeneratorCommand) -> None:
    assert command_from_json(message_line(order)) == order


@pytest.mark.parametrize(
    "message",
    [
        Ready(),
        LoadDelta(14.0, 300, (ANSWERED,), (InFlight(13.5, None), InFlight(13.4, 0.2))),
        LoadReport((ANSWERED, FAILED), 3.5, 300, 2, WarmUp(16, 2.5, False)),
        LoadFailure("ValueError: no such dataset"),
    ],
)
def test_messages_arrive_as_they_were_sent(message: GeneratorMessage) -> None:
    line = message_line(message)

    assert "\n" not in line
    assert MESSAGES.validate_json(line) == message


@pytest.mark.parametrize("line", ["{}", "[]", '{"type": "pause"}', '{"type": "end", "how": "slowly"}', "{"])
def test_other_orders_are_refused(line: str) -> None:
    with pytest.raises((ValueError, LookupError, TypeError)):
        command_from_json(line)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 1e12, "soon", [1]])
def test_a_time_that_is_no_time_is_refused(seconds: object) -> None:
    row: dict[str, object] = {"ttft_s": seconds, "e2e_s": 1.0, "itls_s": [], "error": ""}
    report: dict[str, object] = {"type": "report", "requests": [row], "duration_s": 1.0, "planned": 1}

    with pytest.raises(ValidationError):
        MESSAGES.validate_json(json.dumps(report))
