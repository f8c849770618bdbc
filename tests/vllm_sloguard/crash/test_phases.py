"""Failed starts and deaths while serving, in logs that show neither the start nor a request."""

import pytest
from vllm_logs import DIRECT, engine_dead, names_its_line, printed, traceback, v0, v1

from vllm_sloguard.crash import Category, classify

HEADER = "INFO 11-18 18:07:20 llm_engine.py:249] Initializing an LLM engine (v0.6.4) with config: model='m'"
NO_OP = "AttributeError: '_OpNamespace' '_C' object has no attribute 'rms_norm'"


def frames(exception: str, *functions: str) -> str:
    """A traceback through ``functions``, each written FILE:FUNCTION."""
    lines = [
        f'  File "/usr/lib/python3/{file}", line 7, in {function}\n    run()'
        for file, function in (entry.split(":") for entry in functions)
    ]
    return "\n".join(["Traceback (most recent call last):", *lines, exception])


DIED_WHILE_SERVING = {
    "the loop of a V0 worker": v0(
        "Error executing method 'start_worker_execution_loop'. This might cause deadlock in distributed execution.\n"
        + traceback("RuntimeError: the tensors have different sizes"),
        source="worker_base.py:581",
        process="RayWorkerWrapper",
    ),
    "offline generation": frames("ValueError: 7 image tokens, but 9 placeholders", "vllm/entrypoints/llm.py:generate"),
    "V0's background task": traceback("ValueError: max() arg is an empty sequence")
    + "\nException in callback functools.partial(<function _log_task_completion at 0x7f>)",
}


@pytest.mark.parametrize("name", DIED_WHILE_SERVING)
def test_deaths_while_serving(name: str) -> None:
    crash = classify(DIED_WHILE_SERVING[name], exit_code=None)
    assert (crash.category, crash.phase) == (Category.ENGINE_DEATH, "serving")


def test_an_error_in_the_profile_run_is_a_failed_start() -> None:
    profile = (
        traceback(NO_OP)
        + f"\n{DIRECT}\n"
        + frames(
            f"AttributeError: Error in model execution: {NO_OP}", "vllm/executor.py:determine_num_available_blocks"
        )
    )
    log = f"{HEADER}\n{v0(profile)}"
    crash = classify(log, exit_code=None)
    assert (crash.category, crash.evidence) == (Category.STARTUP_FAILURE, NO_OP)
    assert names_its_line(crash, log)


def test_a_task_that_failed_during_the_start_is_evidence_if_nothing_else_is() -> None:
    failed = "RuntimeError: Engine process failed to start. See stack trace for the root cause."
    task = (
        "Task exception was never retrieved\nfuture: <Task finished name='Task-2' exception=ZMQError()>\n"
        + traceback("zmq.error.ZMQError: Operation not supported")
    )
    crash = classify(f"{HEADER}\n{task}\n{traceback(failed)}", exit_code=None)
    assert (crash.category, crash.evidence) == (
        Category.STARTUP_FAILURE,
        "zmq.error.ZMQError: Operation not supported",
    )
    cause = traceback("ValueError: the scales must be per tensor")
    assert "per tensor" in classify(f"{HEADER}\n{cause}\n{task}\n{traceback(failed)}", exit_code=None).evidence
    assert classify(f"{HEADER}\n{traceback(failed)}", exit_code=None).evidence == failed


def test_a_device_that_fails_while_its_input_is_logged() -> None:
    illegal = "RuntimeError: CUDA error: an illegal memory access was encountered"
    log = f"--- Logging error ---\n{traceback(illegal)}\n{v1('EngineCore', traceback(illegal))}\n{engine_dead()}"
    crash = classify(log, exit_code=None)
    assert (crash.category, crash.line_number) == (Category.CUDA_ERROR, 5)
    harmless = f"--- Logging error ---\n{traceback('ValueError: I/O operation on closed file')}"
    assert classify(harmless, exit_code=None).line_number is None


def test_the_report_of_a_death_comes_before_a_quotation_of_it() -> None:
    died = "RuntimeError('Engine process (pid 4711) died.')"
    quoted = (
        f"MQEngineDeadError: Engine loop is not running. Inspect the stacktrace to find the original error: {died}."
    )
    log = f"{v0(died, source='client.py:307')}\n{printed('APIServer', traceback(quoted))}"
    crash = classify(log, exit_code=None)
    assert (crash.category, crash.line_number) == (Category.ENGINE_DEATH, 1)


def test_the_level_of_records_with_a_pid() -> None:
    """As a logging configuration of the operator's formats them."""
    illegal = "RuntimeError: CUDA error: an illegal memory access was encountered"
    warning = f"2026-01-02 21:40:35 WARNING 56542 [model_runner_base.py:143] The inputs could not be pickled: {illegal}"
    died = "\n".join(
        f"2026-01-02 21:40:35 ERROR 56542 [async_llm_engine.py:64] {line}" for line in traceback(illegal).split("\n")
    )
    crash = classify(f"{warning}\n{died}", exit_code=None)
    assert (crash.category, crash.line_number, crash.evidence) == (Category.CUDA_ERROR, 5, illegal)
