"""One log, one crash: what is no cause, which run counts, what is reported where the log is silent."""

# ruff: noqa: E501 - the logs' own lines

import json
from pathlib import Path

import pytest
from vllm_logs import engine_dead, prefixed, printed, serving, start_failed, traceback, v0, v1

from vllm_sloguard.crash import Category, classify, classify_file

LOGS = Path(__file__).parent / "logs"
OOM, CUDA, STARTUP, TIMEOUT, DEATH = (
    Category.OUT_OF_MEMORY,
    Category.CUDA_ERROR,
    Category.STARTUP_FAILURE,
    Category.TIMEOUT,
    Category.ENGINE_DEATH,
)
NO_BLOCKS = "ValueError: No available memory for the cache blocks."

# Short excerpts of vLLM 0.32's own output (CPU build).
EXCERPTS = [
    ("batched_tokens_below_seqs", STARTUP, "max_num_batched_tokens (8) must be greater than or equal", ""),
    ("block_size_16_on_cpu", STARTUP, "No common block size for 16 (CPU_ATTN: [MultipleOf(32)])", "Worker"),
    ("engine_core_killed", DEATH, "engine core exited unexpectedly", "APIServer"),
    ("kv_bytes_above_memory", OOM, "ValueError: Available memory on node 0", "Worker"),
    ("port_in_use", STARTUP, "OSError: [Errno 98] Address already in use", ""),
    ("unknown_flag", STARTUP, "unrecognized arguments: --max-num-seq-typo", ""),
]


def phase_of(name: str) -> str:
    return "serving" if name.endswith("killed") else "starting"


@pytest.mark.parametrize(("name", "category", "evidence", "process"), EXCERPTS)
def test_excerpts(name: str, category: Category, evidence: str, process: str) -> None:
    crash = classify_file(LOGS / f"{name}.log", phase=phase_of(name), exit_code=0)
    assert (crash.category, crash.process) == (category, process)
    assert evidence in crash.evidence
    assert "ERROR" not in crash.evidence
    assert "pid=" not in crash.evidence
    text = (LOGS / f"{name}.log").read_text(encoding="utf-8")
    assert crash.line_number is not None
    assert evidence.partition(": ")[0] in text.split("\n")[crash.line_number - 1]
    assert classify(text, exit_code=0) == crash  # the phase is in the log, too


def test_every_excerpt_has_an_expectation() -> None:
    assert {path.stem for path in LOGS.glob("*.log")} == {name for name, *_ in EXCERPTS}


@pytest.mark.parametrize(
    "prefix",
    [
        "vllm-1  | ",
        "vllm-sm120  | ",
        "2026-09-05T00:38:34.123456789Z stderr F ",
        "[2026-09-05T00:38:34Z] ",
        "2026-09-05 00:38:34,123 ",
        "Sep  5 00:38:34 gpu7.example python[812]: ",
        "[pod/vllm-7f9c-x/server] ",
        "(RayWorkerWrapper pid=7, ip=192.0.2.1) ",
        "(APIServer pid=716) ",
        "\x1b[36m(RayWorkerWrapper pid=7)\x1b[0m ",
        "[36m(RayWorkerWrapper pid=7)[0m ",
        "[rank0]: ",
        "│ ",
        "[vllm] | ",
        "(APIServer pid=32) (EngineCore_0 pid=296) (VllmWorker TP0 pid=302) ",
    ],
)
@pytest.mark.parametrize("own", ["", "v1", "v0"])
def test_prefixes(prefix: str, own: str) -> None:
    text = f"Starting failed.\n{traceback(NO_BLOCKS, 'raise ValueError(NO)')}"
    text = v1("EngineCore", text) if own == "v1" else v0(text) if own == "v0" else text
    crash = classify(prefixed(prefix, text), phase="starting", exit_code=1)
    assert (crash.category, crash.evidence) == (OOM, NO_BLOCKS)
    if own == "v1":
        assert crash.process == "EngineCore"


@pytest.mark.parametrize(
    "prefix",
    [
        "gpu-7/web~{0} <{0:04d}> ",
        "[Runner kooEr8Ccal]: 2024-11-13T03:15:{0:02d}.672Z 1 stdout: ",
        "2026-06-09 14:01:{0:02d}.604 [Info] (Process) ",
        "{1} 2025-11-19T20:16:{0:02d}.096501749Z [resource.labels.containerName: vllm] ",
    ],
)
def test_a_prefix_of_unknown_shape_is_learned_from_vllms_own_lines(prefix: str) -> None:
    def shown(index: int, line: str) -> str:
        return f"{prefix.format(index, ('INFO', 'ERROR')[index % 2])}{line}"

    lines = ["INFO 11-18 18:07:28 api_server.py:528] vLLM API server version 0.6.3", *traceback(NO_BLOCKS).split("\n")]
    crash = classify("\n".join(shown(n, line) for n, line in enumerate(lines)), phase="starting", exit_code=1)
    assert (crash.category, crash.evidence) == (OOM, NO_BLOCKS)


def test_a_log_that_was_pasted_with_an_indentation() -> None:
    begin = v1("Worker", "WorkerProc failed to start.\n" + traceback("RuntimeError: Unexpected error from"))
    log = prefixed("  ", f"{begin}\ncudaGetDeviceCount(). Did you run some cuda functions before?\n{start_failed()}")
    crash = classify(log, exit_code=None)
    assert crash.category is CUDA
    assert crash.evidence.startswith("RuntimeError: Unexpected error from cudaGetDeviceCount()")


@pytest.mark.parametrize(
    "prefix",
    ["2026-01-02T16:43:45,497 [INFO ] W-9000-model_1.0-stdout MODEL_LOG - ", "[INFO] ", "worker-7 stdout> ", "INFO: "],
)
def test_a_collector_that_shows_a_traceback_as_info(prefix: str) -> None:
    text = f"Loading weights\n{traceback('OSError: You are trying to access a gated repo.')}"
    crash = classify(prefixed(prefix, text), phase="starting", exit_code=None)
    assert (crash.category, crash.evidence) == (STARTUP, "OSError: You are trying to access a gated repo.")


def test_the_severity_of_a_collector_is_not_the_level() -> None:
    lines = ["Loading shards: 10%", *traceback(NO_BLOCKS).split("\n")]
    shown = "\n".join(json.dumps({"severity": "INFO", "message": line}) for line in lines)
    assert classify(shown, phase="starting", exit_code=None).evidence == NO_BLOCKS
    bar = json.dumps({"severity": "ERROR", "message": "Loading shards: 20%"})
    assert classify(bar, phase="starting", exit_code=None).line_number is None


def test_two_short_records_on_one_line() -> None:
    line = "RuntimeError: shape ERROR 07-04 14:53:23 [engine.py:458] RuntimeError: Engine loop has died"
    assert classify(line, phase="serving", exit_code=None).evidence == "RuntimeError: shape"


@pytest.mark.parametrize(
    ("line", "process"),
    [
        ("(EngineCore) ERROR [core.py:1138] KeyError: 'kv'", "EngineCore"),
        ("(VllmWorker TP1 pid=302) ERROR 08-25 11:01:23 [x.py:7] KeyError: 'kv'", "VllmWorker TP1"),
        ("(VllmWorker rank=3 pid=406) ERROR 07-23 19:34:51 [x.py:487] KeyError: 'kv'", "VllmWorker rank=3"),
        ("(EngineCore_DP0 pid=7) (RayWorkerWrapper pid=132, ip=192.0.2.9) KeyError: 'kv'", "RayWorkerWrapper"),
        ("(EngineCore_DP0 pid=2776) ERROR 11-03 23:14 [core.py:710] KeyError: 'kv'", "EngineCore_DP0"),
    ],
)
def test_names_of_processes(line: str, process: str) -> None:
    crash = classify(line, phase="serving", exit_code=None)
    assert (crash.evidence, crash.process) == ("KeyError: 'kv'", process)


@pytest.mark.parametrize(
    "line",
    [
        "(APIServer pid=1) INFO 11-22 05:29:01 [api.py:1] prompt: 'CUDA out of memory'",
        "(EngineCore pid=1) WARNING 11-22 05:29:01 [a.py:1] little headroom; CUDA error: recovered",
        "little headroom, the zoom is off",
        "ERROR:    Exception in ASGI application",
        "(EngineCore pid=1) INFO 11-22 05:29:01 [a.py:1] Resolved architecture: BloomForCausalLM",
        "args: Namespace(model='bloom', middleware=['timing_middleware'], timeout_keep_alive=5)",
        "(EngineCore pid=1) ERROR 11-22 05:29:01 [core.py:1]     raise torch.OutOfMemoryError('CUDA out of memory')",
        "(APIServer pid=1) ERROR 11-22 05:29:01 [serving.py:9] ValueError: this prompt is too long",
        "If the timeout is too short, raise VLLM_RPC_TIMEOUT.",
        "For debugging consider passing CUDA_LAUNCH_BLOCKING=1",
        "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
        "/usr/lib/resource_tracker.py:279: UserWarning: resource_tracker: There appear to be 1 leaked shared_memory objects",
    ],
)
def test_lines_that_are_no_cause(line: str) -> None:
    crash = classify(line, phase="serving", exit_code=0)
    assert (crash.category, crash.line_number) == (DEATH, None)
    assert crash.evidence == "unexpected exit, code 0; nothing in the log says why"


def test_a_bad_request_is_not_why_the_engine_died() -> None:
    request = "ERROR:    Exception in ASGI application\n" + traceback("json.decoder.JSONDecodeError: Expecting value")
    rejected = v1(
        "APIServer",
        "Error in preprocessing prompt inputs\n" + traceback("ValueError: 9000 tokens"),
        source="serving_chat.py:210",
    )
    engine = v1("EngineCore", "Invocation of add_lora method failed\n" + traceback("ValueError: no such adapter"))
    died = v1("Worker_TP0", traceback("RuntimeError: expected scalar type Half"), source="multiproc_executor.py:596")
    for bad in (request, rejected, engine):
        crash = classify(f"{serving()}\n{bad}\n{died}\n{engine_dead()}", exit_code=None)
        assert crash.evidence == "RuntimeError: expected scalar type Half"
        assert (
            "engine core exited"
            in classify(
                f"{serving()}\n{bad}\n" + v1("APIServer", "engine core exited unexpectedly", level="WARNING"),
                exit_code=None,
            ).evidence
        )


def test_an_exception_that_was_ignored_is_no_cause() -> None:
    ignored = "Exception ignored in: <function Pool.__del__ at 0x7f>\n" + traceback(
        "AttributeError: 'NoneType' has no dumps"
    )
    usage = "Exception in thread Thread-2 (_report_usage_worker):\n" + traceback("KeyError: 'brand_raw'")
    crash = classify(f"{usage}\n{ignored}\n{traceback(NO_BLOCKS)}", phase="starting", exit_code=1)
    assert crash.category is OOM


def test_a_wrapper_is_quoted_only_where_nothing_better_is() -> None:
    quote = "RuntimeError: Worker failed with error 'CUDA out of memory. Tried', please check the stack trace above"
    alone = classify(quote, phase="serving", exit_code=0)
    assert (alone.category, alone.evidence) == (OOM, "CUDA out of memory. Tried")
    cause = "(Worker_TP1 pid=9) ERROR 11-22 05:29:01 [x.py:1] KeyError: 'layer.7'"
    both = classify(f"{quote}\n{cause}", phase="serving", exit_code=0)
    assert (both.category, both.evidence, both.process) == (DEATH, "KeyError: 'layer.7'", "Worker_TP1")


def test_the_first_cause_of_all_processes_wins() -> None:
    later = v1("Worker_TP0", traceback("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."))
    first = v1("Worker_TP3", traceback("torch.AcceleratorError: CUDA error: an illegal memory access was encountered"))
    crash = classify(f"{first}\n{later}", phase="serving", exit_code=0)
    assert (crash.category, crash.process) == (CUDA, "Worker_TP3")


def test_interleaved_tracebacks_keep_their_own_chains() -> None:
    one = v1("Worker_TP0", traceback("ValueError: a")).split("\n")
    two = v1("Worker_TP1", traceback("TypeError: b")).split("\n")
    mixed = "\n".join(line for pair in zip(one, two, strict=True) for line in pair)
    crash = classify(mixed, phase="starting", exit_code=1)
    assert (crash.evidence, crash.process) == ("ValueError: a", "Worker_TP0")


def test_the_last_run_of_a_log_counts() -> None:
    def run(exception: str) -> str:
        begin = v0("vLLM API server version 0.8.5", level="INFO", source="api_server.py:1043")
        return f"{begin}\n{v1('EngineCore', traceback(exception))}\n{start_failed()}"

    log = f"{run(NO_BLOCKS)}\n{run('KeyError: 1')}"
    crash = classify(log, exit_code=None)
    assert (crash.category, crash.evidence) == (STARTUP, "KeyError: 1")
    cut_off = f"{log}\n" + v0("vLLM API server version 0.8.5", level="INFO")
    assert classify(cut_off, exit_code=None).evidence == "KeyError: 1"


def test_a_crash_that_no_rule_names_keeps_its_last_error() -> None:
    log = "\n".join(
        [
            v1("EngineCore", "First complaint", level="ERROR"),
            v1("EngineCore", "Flux capacitor misaligned", level="ERROR"),
            v1("EngineCore", "EngineCore failed to start.", level="ERROR"),
        ]
    )
    crash = classify(log, phase="starting", exit_code=1)
    assert (crash.category, crash.evidence, crash.line_number) == (STARTUP, "Flux capacitor misaligned", 2)


@pytest.mark.parametrize(
    ("phase", "exit_code", "category", "evidence"),
    [
        ("starting", -9, STARTUP, "exit code -9, SIGKILL"),
        ("serving", -9, DEATH, "exit code -9, SIGKILL"),
        ("serving", 137, OOM, "128 + SIGKILL"),
        ("starting", 0, STARTUP, "unexpected exit, code 0"),
        ("serving", None, DEATH, "no exit code"),
        ("serving", -99, DEATH, "signal 99"),
    ],
)
def test_a_silent_log(phase: str, exit_code: int | None, category: Category, evidence: str) -> None:
    crash = classify("", phase=phase, exit_code=exit_code)
    assert crash.category is category
    assert evidence in crash.evidence
    assert "nothing in the log says why" in crash.evidence


def test_a_deadline_gives_way_to_a_cause_in_the_log() -> None:
    hung = classify("loading\nstill loading\n", phase="starting", exit_code=None, timed_out=True)
    assert (hung.category, hung.evidence) == (TIMEOUT, "the deadline passed while starting; last line: still loading")
    known = classify(NO_BLOCKS, phase="starting", exit_code=None, timed_out=True)
    assert known.category is OOM


def test_carriage_returns_and_control_characters() -> None:
    crash = classify("\x1b[31mRuntimeError: b\x00ad\x1b[0m", phase="starting", exit_code=1)
    assert crash.evidence == "RuntimeError: bad"
    bar = "Loading shards:  10%|#  | 1/9\rLoading shards:  20%|## | 2/9\r" + printed("EngineCore", NO_BLOCKS) + "\r\n"
    assert classify(bar, phase="starting", exit_code=1).evidence == NO_BLOCKS
    assert len(classify(f"ValueError: {'x' * 100_000}", phase="starting", exit_code=1).evidence) == 500
