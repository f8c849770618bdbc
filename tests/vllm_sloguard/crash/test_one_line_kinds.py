"""Kinds of crash that one line tells, on all kinds of hardware and in all kinds of deployment."""

# ruff: noqa: E501 - the logs' own lines

import pytest
from vllm_logs import DIRECT, HANDLING, names_its_line, prefixed, printed, serving, start_failed, traceback, v1

from vllm_sloguard.crash import Category, classify

OOM, CUDA, STARTUP, TIMEOUT, DEATH = (
    Category.OUT_OF_MEMORY,
    Category.CUDA_ERROR,
    Category.STARTUP_FAILURE,
    Category.TIMEOUT,
    Category.ENGINE_DEATH,
)
LINES = [
    (OOM, "RuntimeError: UR backend failed: UR_RESULT_ERROR_OUT_OF_RESOURCES"),
    (OOM, "RuntimeError: [Rank:0] FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::268435456"),
    (OOM, "[metal::malloc] Attempting to allocate 18253611008 bytes which is greater than the maximum buffer size."),
    (OOM, "OSError: [Errno 28] No space left on device: '/psm_1a2b3c4d'"),
    (OOM, "kernel: Memory cgroup out of memory: Killed process 4711 (VLLM::EngineCor) total-vm:91231232kB"),
    (OOM, "systemd[1]: vllm.service: A process of this unit has been killed by the OOM killer."),
    (OOM, "systemd[1]: vllm.service: Main process exited, code=killed, status=9/KILL"),
    (OOM, "[ERROR] Worker (pid:4711) was sent SIGKILL! Perhaps out of memory?"),
    (OOM, "ValueError: Ran out of memory in memory space hbm while allocating on stack for %fusion.7"),
    (OOM, 'RuntimeError: nrt_tensor_allocate status=4 message="Allocation Failure"'),
    (OOM, "2026-Jan-02 10:27:42.29  7:7  ERROR  TDRV:dmem_alloc_internal  Failed to alloc DEVICE memory: 1024"),
    (CUDA, "/torch/native/hip/IndexKernel.hip:94: operator(): Device-side assertion `index < size' failed."),
    (CUDA, "torch.cuda.DeferredCudaCallError: CUDA call failed lazily at initialization with error: device >= 0"),
    (CUDA, "RuntimeError: CUDA driver initialization failed, you might not have a CUDA gpu."),
    (
        CUDA,
        "RuntimeError: Check failed: (status == cudaSuccess) is false: BatchDecode failed with error invalid argument",
    ),
    (CUDA, "RuntimeError: synStatus=26 [Generic failure] Device acquire failed."),
    (CUDA, "RuntimeError: ERR00100 PTA call acl api failed"),
    (CUDA, "RuntimeError: ERR02200 DIST call hccl api failed."),
    (CUDA, "RuntimeError: aclnnGroupedMatmul failed, detail:EZ1001: 2025-01-02 the size must be positive"),
    (CUDA, "RuntimeError: Native API failed. Native API returns: -50 (PI_ERROR_INVALID_ARG_VALUE)"),
    (STARTUP, "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'"),
    (STARTUP, "nvcc fatal   : Unsupported gpu architecture 'compute_120a'"),
    (STARTUP, "/bin/sh: 1: /usr/local/cuda/bin/nvcc: not found"),
    (STARTUP, "Warning  FailedScheduling  0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
    (STARTUP, "TimeoutError: The read operation timed out"),
    (TIMEOUT, "ray.exceptions.RayChannelTimeoutError: System error: Timed out waiting for object available to read."),
    (TIMEOUT, "systemd[1]: vllm.service: start operation timed out. Terminating."),
    (DEATH, "[1]    4711 segmentation fault (core dumped)  vllm serve model"),
    (DEATH, "free(): double free detected in tcache 2"),
    (DEATH, "systemd[1]: vllm.service: Main process exited, code=dumped, status=11/SEGV"),
]


@pytest.mark.parametrize(("category", "line"), LINES, ids=lambda value: str(value)[:40])
def test_alone_and_before_what_it_led_to(category: Category, line: str) -> None:
    for log in (line, f"Loading weights\n{printed('EngineCore', line)}\n{start_failed()}"):
        crash = classify(log, exit_code=None)
        assert crash.category is category
        assert crash.evidence.removesuffix(" (SIGSEGV)") in line
        assert names_its_line(crash, log)


def test_the_compiler_is_the_cause_of_a_failed_build() -> None:
    build = (
        traceback("RuntimeError: Ninja build failed. Ninja output:")
        + "\n[1/2] /usr/local/cuda/bin/nvcc -c sampling.cu -o sampling.cuda.o\nFAILED: sampling.cuda.o\n"
        "/tmp/ops/sampling.cu:12:10: fatal error: curand.h: No such file or directory\nninja: build stopped: subcommand failed."
    )
    crash = classify(f"{v1('EngineCore', build)}\n{start_failed()}", exit_code=None)
    assert (crash.category, crash.line_number) == (STARTUP, 7)
    assert "fatal error: curand.h" in crash.evidence
    silent = traceback("RuntimeError: Ninja build failed. Ninja output:")
    assert "Ninja build failed" in classify(f"{v1('EngineCore', silent)}\n{start_failed()}", exit_code=None).evidence


def test_a_download_that_times_out_is_no_hang() -> None:
    log = (
        traceback("TimeoutError: [Errno 110] Connection timed out")
        + f"\n{DIRECT}\n"
        + traceback("requests.exceptions.ConnectTimeout: (MaxRetryError('HTTPSConnectionPool(host=huggingface.co)'))")
        + f"\n{HANDLING}\n"
        + traceback("OSError: We couldn't connect to 'https://huggingface.co' to load the files.")
    )
    assert classify(prefixed("(APIServer pid=1) ", log), exit_code=None).category is STARTUP


def test_ray_serve_reports_requests_and_replicas() -> None:
    def shown(text: str) -> str:
        return prefixed("(ServeReplica:llm:Server pid=7, ip=192.0.2.1) ", text)

    request = "ERROR 2026-01-02 22:02:00,377 llm_Server 8d5aszha 5b1e9f25-0480 -- Request failed.\n"
    failed = shown(request + traceback("ValueError: the prompt is too long"))
    died = shown(traceback("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."))
    quiet = shown("INFO 2026-01-02 22:02:00,377 llm_Server 8d5aszha -- POST /v1/completions 200 CUDA error: none")
    crash = classify(f"{serving()}\n{quiet}\n{failed}\n{died}", exit_code=None)
    assert (crash.category, crash.process) == (OOM, "ServeReplica:llm:Server")
    assert classify(f"{serving()}\n{quiet}\n{failed}", exit_code=None).line_number is None


def test_what_ascend_prints_at_every_exit_is_not_the_cause() -> None:
    exit_line = "[ERROR] 2026-01-02-15:30:14 (PID:7, Device:-1, RankID:-1) ERR99999 UNKNOWN applicaiton exception"
    crash = classify(f"{start_failed()}\n{exit_line}", exit_code=None)
    assert "Engine core initialization failed" in crash.evidence
