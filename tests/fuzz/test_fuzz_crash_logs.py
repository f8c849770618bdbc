"""Any text as a log: it is classified, the evidence is bounded, and the line number exists."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_sloguard.crash import Category, classify

PIECES = st.sampled_from(
    [
        "(EngineCore_DP0 pid=7) ERROR 11-22 05:29:01 [core.py:708] ",
        "(Worker_TP1 pid=8, ip=192.0.2.1) ",
        "ERROR 11-18 18:07:28 engine.py:366] ",
        "vllm-1  | ",
        "2026-09-05T00:38:34Z stderr F ",
        "[rank2]:[E1112 09:49:50.78 ProcessGroupNCCL.cpp:616] ",
        "Traceback (most recent call last):\n",
        '  File "x.py", line 7, in run\n',
        "\nThe above exception was the direct cause of the following exception:\n",
        "\nDuring handling of the above exception, another exception occurred:\n",
        "pydantic_core.ValidationError: 1 validation error for ModelConfig\n",
        "  Value error, no [type=value_error]\n",
        "ValueError: \n",
        "KeyError: 'x'\n",
        "CUDA out of memory",
        "vLLM API server version 0.8\n",
        "INFO:     Application startup complete.\n",
        '{"log": "ValueError: a\\n"}\n',
        "\n",
        "\r",
    ]
)
LOGS = st.lists(st.one_of(PIECES, st.text(max_size=40)), max_size=30).map("".join)


@given(LOGS, st.sampled_from(["starting", "serving", None]), st.sampled_from([None, 0, 1, -9, 137]))
def test_any_text_is_a_log(log: str, phase: str | None, exit_code: int | None) -> None:
    crash = classify(log, phase=phase, exit_code=exit_code)
    assert isinstance(crash.category, Category)
    assert 0 < len(crash.evidence) <= 600
    if crash.line_number is not None:
        assert 1 <= crash.line_number <= log.count("\n") + 1
    assert classify(log, phase=phase, exit_code=exit_code) == crash
