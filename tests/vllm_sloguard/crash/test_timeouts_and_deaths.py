"""Processes that waited in vain, native crashes, and engines that are found dead."""

# ruff: noqa: E501 - the logs' own lines

import pytest
from vllm_logs import (
    DIRECT,
    HANDLING,
    engine_dead,
    names_its_line,
    printed,
    serving,
    start_failed,
    traceback,
    v0,
    v08,
    v1,
)

from vllm_sloguard.crash import Category, classify

WATCHDOG = (
    "[Rank 2] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=2, OpType=ALLREDUCE, NumelIn=128,"
    " Timeout(ms)=600000) ran for 600059 milliseconds before timing out."
)
SUPPOSED = (
    "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of"
    " file. There are some potential root causes. (1) The process is killed by SIGKILL by OOM killer due to high memory"
    " usage. (2) ray stop --force is called. (3) The worker is crashed unexpectedly due to SIGSEGV."
)

TIMEOUTS = {
    "watchdog": (
        f"[rank2]:[E1112 09:49:50.783340025 ProcessGroupNCCL.cpp:616] {WATCHDOG}\n"
        "[rank2]:[E1112 09:49:50.79 ProcessGroupNCCL.cpp:630] To avoid data inconsistency, we are taking the process down.\n"
        "terminate called after throwing an instance of 'c10::DistBackendError'\n"
        f"  what():  {WATCHDOG}\nFatal Python error: Aborted\n{engine_dead()}",
        "Watchdog caught collective operation timeout",
    ),
    "watchdog in Ray": (
        printed("RayWorkerVllm", f"[E ProcessGroupNCCL.cpp:475] {WATCHDOG}") + f"\n{SUPPOSED}",
        "Watchdog caught collective operation timeout",
    ),
    "heartbeat": (
        "[rank0]:[F1112 10:00:00.1 ProcessGroupNCCL.cpp:1557] [PG ID 0 Rank 0] Heartbeat monitor timed out! Process will"
        " be terminated after dumping debug info.",
        "Heartbeat monitor timed out!",
    ),
    "a queue between processes": (
        v1(
            "EngineCore_0",
            "EngineCore encountered a fatal error.\n"
            + traceback("TimeoutError", "raise TimeoutError")
            + f"\n{DIRECT}\n"
            + traceback("RuntimeError: the executor has failed"),
        )
        + f"\n{engine_dead()}",
        "TimeoutError",
    ),
    "a queue, and the call that waited": (
        v1(
            "EngineCore_DP0",
            traceback("TimeoutError", "raise TimeoutError")
            + f"\n{DIRECT}\n"
            + traceback("TimeoutError: RPC call to sample_tokens timed out."),
        ),
        "TimeoutError: RPC call to sample_tokens timed out.",
    ),
    "engines that never said hello": (
        printed(
            "ApiServer_0",
            traceback("RuntimeError: Timed out waiting for engines to send initial message on input socket."),
        ),
        "Timed out waiting for engines to send initial message",
    ),
    "V0 iteration": (
        v0(
            "Engine iteration timed out. This should never happen!\n" + traceback("asyncio.exceptions.TimeoutError"),
            source="async_llm_engine.py:663",
        ),
        "Engine iteration timed out. This should never happen!",
    ),
    "V0 heartbeat": (
        v0(
            "vllm.engine.multiprocessing.MQEngineDeadError: Engine loop is not running. Inspect the stacktrace to find the"
            " original error: TimeoutError('No heartbeat received from MQLLMEngine').",
            source="serving_chat.py:596",
        )
        + "\n"
        + v0("MQLLMEngine is already dead, terminating server process", level="CRITICAL", source="launcher.py:99"),
        "TimeoutError('No heartbeat received from MQLLMEngine')",
    ),
    "store of another node": (
        v08(
            traceback(
                "torch.distributed.DistStoreError: Timed out after 601 seconds waiting for clients. 1/2 clients joined."
            )
        ),
        "Timed out after 601 seconds waiting for clients",
    ),
}

SIGNALS = {
    "absl": (
        printed(
            "RayWorkerWrapper", "*** SIGSEGV received at time=1721904360 on cpu 48 ***\nPC: @ 0x7f17f832d44a (unknown)"
        )
        + "\n"
        + printed(
            "RayWorkerWrapper", "[2026-07-25 10:46:00,050 E 24036 24036] logging.cc:440: *** SIGSEGV received at time=1"
        )
        + "\n"
        + printed("RayWorkerWrapper", "Fatal Python error: Segmentation fault"),
        "*** SIGSEGV received at time=1721904360 on cpu 48 ***",
        "SIGSEGV",
    ),
    "absl, bus error": (
        f"{SUPPOSED}\n(RayWorker pid=4712, ip=192.0.2.1) *** SIGBUS received at time=1692322557 on cpu 3 ***",
        "*** SIGBUS received at time=1692322557",
        "SIGBUS",
    ),
    "faulthandler": (
        "Fatal Python error: Segmentation fault\n\nThread 0x00007f74511ef700 (most recent call first):\n"
        '  File "/usr/lib/vllm/pynccl_wrapper.py", line 257 in ncclAllReduce',
        "Fatal Python error: Segmentation fault",
        "SIGSEGV",
    ),
    "torch": (
        '!!!!!!! Segfault encountered !!!!!!!\n  File "<unknown>", line 0, in fn',
        "!!!!!!! Segfault encountered !!!!!!!",
        "SIGSEGV",
    ),
    "kernel": (
        "traps: python3[135514] trap invalid opcode ip:7065e0b0a751 sp:7ffef1bd82c0",
        "trap invalid opcode",
        "SIGILL",
    ),
    "a container's exit": ("vllm-1 exited with code 139", "vllm-1 exited with code 139", "139"),
    "shell": (
        "./serve.sh: line 3:  4711 Illegal instruction (core dumped) vllm serve x",
        "Illegal instruction (core dumped)",
        "SIGILL",
    ),
}

DEATHS = {
    "V0 process": (
        v0("RuntimeError('Engine process (pid 76) died.')", source="client.py:282"),
        "RuntimeError('Engine process (pid 76) died.')",
    ),
    "V0 loop": (
        v0(
            f"RuntimeError('Engine loop has died')\n{traceback('RuntimeError: Engine loop has died')}",
            source="client.py:250",
        ),
        "Engine loop has died",
    ),
    "V1 core": (engine_dead(), "EngineDeadError"),
    "a worker": (
        v1(
            "EngineCore_DP0",
            "Worker proc VllmWorker-1 died unexpectedly, shutting down executor.",
            source="multiproc_executor.py:154",
        ),
        "Worker proc VllmWorker-1 died unexpectedly",
    ),
    "V0 executor of 0.8": (
        v08(
            "MulitprocExecutor got fatal signal from worker processes, shutting down. See stack trace above for root cause issue.",
            level="CRITICAL",
        ),
        "got fatal signal from worker processes",
    ),
    "what a dead engine left behind": (
        v0(
            "vllm.engine.multiprocessing.MQEngineDeadError: Engine loop is not running. Inspect the stacktrace to find the"
            " original error: AssertionError('Error in model execution').",
            source="serving_chat.py:596",
        ),
        "AssertionError('Error in model execution')",
    ),
    "Ray's actor": (
        traceback("ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.")
        + f"\n\tclass_name: W\n{SUPPOSED}",
        "ray.exceptions.ActorDiedError: The actor died unexpectedly",
    ),
    "an assertion of the engine": (
        v1(
            "EngineCore_DP0",
            f"EngineCore encountered a fatal error.\n{traceback('AssertionError: num_new_tokens > 0')}",
        )
        + f"\n{engine_dead()}",
        "AssertionError: num_new_tokens > 0",
    ),
    "a worker's exception before the peers' complaints": (
        v1(
            "Worker_TP0",
            f"WorkerProc hit an exception.\n{traceback('IndexError: list index out of range')}",
            source="multiproc_executor.py:596",
        )
        + "\n"
        + v1("Worker_TP1", traceback("RuntimeError: NCCL error: remote process exited or there was a network error"))
        + "\n"
        + printed(
            "Worker_TP2",
            traceback("RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
        )
        + f"\n{engine_dead()}",
        "IndexError: list index out of range",
    ),
}


STOPS = {
    "by its supervisor": (
        f"{serving()}\n"
        + v1("EngineCore", "[shutdown] EngineCore: trigger received signal=SIGTERM", level="INFO")
        + "\n"
        + v1("EngineCore", traceback("RuntimeError: reentrant call inside <_io.BufferedWriter name='x.log'>"))
        + f"\n{engine_dead()}\nnode7 exited with code 143",
        "trigger received signal=SIGTERM",
        Category.ENGINE_DEATH,
    ),
    "by Slurm, at its time limit": (
        f"{serving()}\nslurmstepd: error: *** JOB 771 ON gpu03 CANCELLED AT 2026-02-03T04:05:06 DUE TO TIME LIMIT ***\n"
        "srun: error: gpu03: task 0: Killed",
        "slurmstepd: error: *** JOB 771 ON gpu03 CANCELLED",
        Category.ENGINE_DEATH,
    ),
    "while it started": (
        v08("Loading weights", level="INFO") + "\n" + traceback("KeyboardInterrupt: terminated", "raise Stop()"),
        "KeyboardInterrupt: terminated",
        Category.STARTUP_FAILURE,
    ),
    "at the terminal": (
        v08("Loading weights", level="INFO") + "\n" + traceback("KeyboardInterrupt", "signal_handler()"),
        "KeyboardInterrupt",
        Category.STARTUP_FAILURE,
    ),
    "in Ray": (
        v0("Waiting for creating a placement group of specs", level="INFO")
        + "\n*** SIGTERM received at time=1700000000 on cpu 8 ***\nPC: @ 0x7a30 (unknown)\n"
        + traceback("asyncio.exceptions.CancelledError"),
        "*** SIGTERM received",
        Category.STARTUP_FAILURE,
    ),
}


@pytest.mark.parametrize("name", TIMEOUTS)
def test_timeouts(name: str) -> None:
    log, cause = TIMEOUTS[name]
    crash = classify(log, phase="serving", exit_code=None)
    assert crash.category is Category.TIMEOUT
    assert cause in crash.evidence
    assert names_its_line(crash, log)


@pytest.mark.parametrize("name", SIGNALS)
def test_native_signals_are_named(name: str) -> None:
    log, cause, number = SIGNALS[name]
    log = f"{serving()}\n{log}"
    crash = classify(log, exit_code=None)
    assert crash.category is Category.ENGINE_DEATH
    assert cause in crash.evidence
    assert names_its_line(crash, log)
    assert number in crash.evidence


@pytest.mark.parametrize("name", DEATHS)
def test_dead_engines(name: str) -> None:
    log, cause = DEATHS[name]
    log = f"{serving()}\n{log}"
    crash = classify(log, exit_code=None)
    assert (crash.category, crash.phase) == (Category.ENGINE_DEATH, "serving")
    assert cause in crash.evidence
    assert names_its_line(crash, log)


def test_a_start_that_failed_without_a_word() -> None:
    crash = classify(start_failed(), exit_code=None)
    assert crash.category is Category.STARTUP_FAILURE
    assert crash.evidence.startswith("RuntimeError: Engine core initialization failed. See root cause above.")


def test_an_exception_before_a_timeout_is_the_cause_and_one_after_it_is_not() -> None:
    broken = v1("Worker_TP1", traceback("KeyError: 'kv'"), source="multiproc_executor.py:596")
    waited = v1("EngineCore_DP0", traceback("TimeoutError: RPC call to execute_model timed out."))
    assert classify(f"{broken}\n{waited}", phase="serving", exit_code=0).evidence == "KeyError: 'kv'"
    assert classify(f"{waited}\n{broken}", phase="serving", exit_code=0).category is Category.TIMEOUT


@pytest.mark.parametrize("name", STOPS)
def test_an_engine_that_was_told_to_stop(name: str) -> None:
    log, cause, category = STOPS[name]
    crash = classify(log, exit_code=None)
    assert crash.category is category
    assert cause in crash.evidence
    assert names_its_line(crash, log)


def test_what_stops_the_rest_of_a_dead_engine_is_not_the_cause() -> None:
    death = v1("APIServer", "Engine core proc EngineCore_DP0 died unexpectedly, shutting down client.")
    stop = v1("EngineCore_DP1", "[shutdown] EngineCore: trigger received signal=SIGTERM", level="INFO")
    crash = classify(f"{serving()}\n{death}\n{stop}", exit_code=None)
    assert crash.evidence.startswith("Engine core proc EngineCore_DP0 died unexpectedly")
    broken = v1("EngineCore_DP0", traceback("KeyError: 'kv'"))
    assert classify(f"{serving()}\n{broken}\n{stop}", exit_code=None).evidence == "KeyError: 'kv'"


def test_a_probe_that_had_no_answer_is_a_timeout() -> None:
    crash = classify(
        "Normal  Killing  12s  kubelet  Container vllm failed liveness probe, will be restarted", exit_code=None
    )
    assert crash.category is Category.TIMEOUT


def test_a_failed_start_after_a_server_that_worked() -> None:
    crash = classify(f"{serving()}\nINFO:     Shutting down\n{start_failed()}", exit_code=None)
    assert (crash.category, crash.phase) == (Category.STARTUP_FAILURE, "starting")


def test_an_error_of_offline_generation_is_no_failed_start() -> None:
    panic = traceback("pyo3_runtime.PanicException: The global thread pool has not been initialized.")
    crash = classify(f"Rendering prompts:   0%|          | 0/8 [00:00<?, ?it/s]\n{panic}", exit_code=None)
    assert (crash.category, crash.phase) == (Category.ENGINE_DEATH, "serving")


def test_what_waits_for_a_dead_worker_times_out_later() -> None:
    died = traceback("ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.")
    waited = traceback("ray.exceptions.GetTimeoutError: Get timed out: some object(s) not ready.")
    crash = classify(f"{serving()}\n{died}\n{HANDLING}\n{waited}", exit_code=None)
    assert (crash.category, crash.evidence.partition(":")[0]) == (
        Category.ENGINE_DEATH,
        "ray.exceptions.ActorDiedError",
    )


def test_a_dead_engine_had_started_unless_the_log_shows_the_start() -> None:
    assert classify(engine_dead(), exit_code=None).phase == "serving"
    died = traceback("ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.")
    assert classify(died, exit_code=None).category is Category.ENGINE_DEATH
    start = v0("Initializing an LLM engine (v0.6.3)", level="INFO")
    assert classify(f"{start}\n{died}", exit_code=None).category is Category.STARTUP_FAILURE
