"""Every way an engine ends gets the right category and the line that says why."""

import time
from pathlib import Path

import pytest

from vllm_sloguard.crash import Category, classify

OWN = Path(__file__).parent / "crash_logs"
SHARED = Path(__file__).parents[3] / "shared" / "measured" / "crash_logs"

OOM, CUDA, STARTUP, TIMEOUT, DEATH = (
    Category.OUT_OF_MEMORY,
    Category.CUDA_ERROR,
    Category.STARTUP_FAILURE,
    Category.TIMEOUT,
    Category.ENGINE_DEATH,
)

# Short excerpts of vLLM 0.32's own output (CPU build).
OWN_LOGS = [
    ("batched_tokens_below_seqs", STARTUP, "max_num_batched_tokens (8) must be greater than or equal", ""),
    ("block_size_16_on_cpu", STARTUP, "No common block size for 16 (CPU_ATTN: [MultipleOf(32)])", "Worker"),
    ("engine_core_killed", DEATH, "engine core exited unexpectedly", "APIServer"),
    ("kv_bytes_above_memory", OOM, "ValueError: Available memory on node 0", "Worker"),
    ("port_in_use", STARTUP, "OSError: [Errno 98] Address already in use", ""),
    ("unknown_flag", STARTUP, "unrecognized arguments: --max-num-seq-typo", ""),
]

# Full output of real failures, kept outside the repository.
SHARED_LOGS = [
    ("cpu-0.32-batched_tokens_below_seqs", STARTUP, "must be greater than or equal to max_num_seqs (16)"),
    ("cpu-0.32-engine_core_killed", DEATH, "exit code 0 that nobody asked for"),
    ("cpu-0.32-kv_below_one_sequence", OOM, "the estimated maximum model length is 1792"),
    ("cpu-0.32-kv_space_above_memory", OOM, "less than requested memory for kv (64.0 GiB)"),
    ("cpu-0.32-model_len_above_derived", STARTUP, "max_model_len (8192) is greater than the derived"),
    ("cpu-0.32-model_missing", STARTUP, "HFValidationError: Repo id must be"),
    ("cpu-0.32-oom_while_loading", OOM, "torch.OutOfMemoryError: CUDA out of memory"),
    ("cpu-0.32-port_in_use", STARTUP, "Address already in use"),
    ("cpu-0.32-tensor_parallel_3_of_4_heads", STARTUP, "must be divisible by tensor parallel size (3)"),
    ("cpu-0.32-unknown_flag", STARTUP, "unrecognized arguments: --no-such-flag"),
    ("h200-0.26-attention_backend_missing", STARTUP, "FLASHINFER is not valid"),
    ("h200-0.26-batched_tokens_below_model_len", STARTUP, "is smaller than max_model_len (8192)"),
    ("h200-0.26-batched_tokens_below_seqs", STARTUP, "to max_num_seqs (2048)"),
    ("h200-0.26-block_size_7", STARTUP, "No valid attention backend found"),
    ("h200-0.26-free_memory_below_utilization", OOM, "Free memory on device cuda:0 (38.69/139.8 GiB)"),
    ("h200-0.26-kv_bytes_60GB_but_utilization_check", OOM, "utilization (0.92, 128.62 GiB)"),
    ("h200-0.26-max_num_seqs_0", STARTUP, "max_num_seqs Input should be greater than or equal to 1"),
    ("h200-0.26-no_memory_for_cache_blocks", OOM, "No available memory for the cache blocks"),
    ("h200-0.26-no_memory_large_batch", OOM, "No available memory for the cache blocks"),
    ("h200-0.26-quantization_without_config", STARTUP, "Cannot find the config file for awq"),
    ("h200-0.26-tensor_parallel_2_on_1_gpu", STARTUP, "World size (2) is larger"),
]


def phase_of(name: str) -> str:
    return "serving" if name.endswith("killed") else "starting"


@pytest.mark.parametrize(("name", "category", "evidence", "process"), OWN_LOGS)
def test_excerpts(name: str, category: Category, evidence: str, process: str) -> None:
    text = (OWN / f"{name}.log").read_text(encoding="utf-8")
    crash = classify(text, phase=phase_of(name), exit_code=0)
    assert (crash.category, crash.process) == (category, process)
    assert evidence in crash.evidence
    assert "ERROR" not in crash.evidence
    assert "pid=" not in crash.evidence


@pytest.mark.parametrize(("name", "category", "evidence"), SHARED_LOGS)
def test_full_logs(name: str, category: Category, evidence: str) -> None:
    path = SHARED / f"{name}.log"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    crash = classify(path.read_text(encoding="utf-8", errors="replace"), phase=phase_of(name), exit_code=0)
    assert crash.category is category
    assert evidence in crash.evidence


def test_every_full_log_has_an_expectation() -> None:
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not on this machine")
    assert {path.stem for path in SHARED.glob("*.log")} == {name for name, *_ in SHARED_LOGS}


@pytest.mark.parametrize(
    ("line", "category"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", OOM),
        ("torch.AcceleratorError: CUDA error: out of memory", OOM),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", OOM),
        ("ValueError: Cannot auto-fit max_model_len: not enough GPU memory available", OOM),
        ("AssertionError: Error in memory profiling. Initial free memory 10.0 GiB, current free memory 20.0", OOM),
        ("Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization", OOM),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory", OOM),
        ("torch.AcceleratorError: CUDA error: an illegal memory access was encountered", CUDA),
        ("  what():  CUDA error: unspecified launch failure", CUDA),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", CUDA),
        ("RuntimeError: CUDA error: device-side assert triggered", CUDA),
        ("RuntimeError: cudaErrorInsufficientDriver", CUDA),
        ("RuntimeError: NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)", CUDA),
        ("TimeoutError: RPC call to execute_model timed out.", TIMEOUT),
        ("RuntimeError: Did not receive response from front-end process within 5 minutes", TIMEOUT),
        ("TimeoutError: Timed out waiting for engine core processes to start.", TIMEOUT),
    ],
)
def test_texts_of_gpus(line: str, category: Category) -> None:
    for prefix in ("", "(EngineCore_DP0 pid=7) ERROR 11-22 05:29:01 [core.py:1330] "):
        crash = classify(prefix + line, phase="serving", exit_code=0)
        assert crash.category is category
        assert crash.evidence == line.strip()


@pytest.mark.parametrize(
    "line",
    [
        "(APIServer pid=1) INFO 11-22 05:29:01 [api.py:1] prompt: 'CUDA out of memory'",
        "(EngineCore pid=1) WARNING 11-22 05:29:01 [a.py:1] little headroom; CUDA error: recovered",
        "little headroom, the zoom is off",
        "(EngineCore pid=1) ERROR 11-22 05:29:01 [core.py:1]     raise torch.OutOfMemoryError('CUDA out of memory')",
        "(APIServer pid=1) ERROR 11-22 05:29:01 [serving.py:9] ValueError: this prompt is too long",
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.",
    ],
)
def test_lines_that_are_no_cause(line: str) -> None:
    crash = classify(line, phase="serving", exit_code=0)
    assert crash.category is DEATH
    assert crash.evidence == "exit code 0 that nobody asked for; nothing in the log says why"


def test_a_wrapper_is_quoted_only_where_nothing_better_is() -> None:
    quote = "RuntimeError: Worker failed with error 'CUDA out of memory. Tried', please check the stack trace above"
    alone = classify(quote, phase="serving", exit_code=0)
    assert (alone.category, alone.evidence) == (OOM, "CUDA out of memory. Tried")
    cause = "(Worker_TP1 pid=9) ERROR 11-22 05:29:01 [x.py:1] KeyError: 'layer.7'"
    both = classify(f"{quote}\n{cause}", phase="serving", exit_code=0)
    assert (both.category, both.evidence, both.process) == (DEATH, "KeyError: 'layer.7'", "Worker_TP1")


@pytest.mark.parametrize(
    ("phase", "exit_code", "category", "evidence"),
    [
        ("starting", -9, STARTUP, "exit code -9, SIGKILL"),
        ("serving", -9, DEATH, "exit code -9, SIGKILL"),
        ("serving", 137, DEATH, "128 + SIGKILL"),
        ("starting", 0, STARTUP, "exit code 0 that nobody asked for"),
        ("serving", None, DEATH, "no exit code"),
        ("serving", -99, DEATH, "signal 99"),
    ],
)
def test_silence_is_said(phase: str, exit_code: int | None, category: Category, evidence: str) -> None:
    crash = classify("", phase=phase, exit_code=exit_code)
    assert crash.category is category
    assert evidence in crash.evidence
    assert "nothing in the log says why" in crash.evidence


def test_a_deadline_gives_way_to_a_cause_in_the_log() -> None:
    hung = classify("loading\nstill loading\n", phase="starting", exit_code=None, timed_out=True)
    assert (hung.category, hung.evidence) == (TIMEOUT, "the deadline passed while starting; last line: still loading")
    known = classify(
        "ValueError: No available memory for the cache blocks.", phase="starting", exit_code=None, timed_out=True
    )
    assert known.category is OOM


def test_junk_and_size() -> None:
    crash = classify("\x1b[31mRuntimeError: b\x00ad\x1b[0m", phase="starting", exit_code=1)
    assert crash.evidence == "RuntimeError: bad"
    long = classify(f"ValueError: {'x' * 100_000}", phase="starting", exit_code=1)
    assert len(long.evidence) == 500
    begin = time.process_time()
    classify("(a pid=1) " * 200_000 + "\n" + "A.b" * 300_000 + "\nINFO: x" * 100_000, phase="serving", exit_code=0)
    assert time.process_time() - begin < 10
