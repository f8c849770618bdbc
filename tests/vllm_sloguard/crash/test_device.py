"""Failures of GPUs, their drivers and the libraries on them."""

# ruff: noqa: E501 - the logs' own lines

import pytest
from vllm_logs import (
    DIRECT,
    engine_dead,
    names_its_line,
    prefixed,
    printed,
    serving,
    start_failed,
    traceback,
    v0,
    v08,
    v1,
)

from vllm_sloguard.crash import Category, classify

ILLEGAL = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"
ADVICE = (
    "\nSearch for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda/ for more information."
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace may be incorrect."
    "\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
    "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
NCCL = "RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)"

STARTING = {
    "no driver": (
        v08(traceback("RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU")),
        "Found no NVIDIA driver on your system",
    ),
    "old driver": (
        v1("EngineCore", traceback("RuntimeError: The NVIDIA driver on your system is too old (found version 12080).")),
        "driver on your system is too old (found version 12080)",
    ),
    "driver of another version": (
        prefixed(
            "2026-09-05T00:38:34.123456789Z stderr F ",
            traceback(
                "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling"
                " NumCudaDevices()? Error 804: forward compatibility was attempted on non supported HW"
            ),
        ),
        "Unexpected error from cudaGetDeviceCount()",
    ),
    "driver library": (
        traceback("ImportError: libcuda.so.1: cannot open shared object file: No such file"),
        "libcuda.so.1",
    ),
    "NVML": (
        traceback("pynvml.NVMLError_LibraryNotFound: NVML Shared Library Not Found", "_nvmlCheckReturn(ret)"),
        "NVMLError_LibraryNotFound",
    ),
    "no GPU visible": (v0(traceback("RuntimeError: No CUDA GPUs are available")), "No CUDA GPUs are available"),
    "NCCL in V0": (
        v0(
            "Exception in worker VllmWorkerProcess while processing method init_device: NCCL error: unhandled system error"
            f" (run with NCCL_DEBUG=INFO for details), {traceback(NCCL)}",
            process="VllmWorkerProcess",
            source="multiproc_worker_utils.py:226",
        ),
        NCCL,
    ),
    "NCCL, wrapped at the width of a terminal": (
        "ERROR 06-29 19:19:59 [multiproc_executor.py:492] torch.distributed.DistBackendError: NCCL error in: /pytorch/csrc/\n"
        "distributed/c10d/ProcessGroupNCCL.cpp:3353, unhandled cuda error (run with NCCL_DEBUG=INFO for detail\n"
        "s), NCCL version 2.26.2\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Cuda failure 999 'unknown error'",
        "torch.distributed.DistBackendError: NCCL error in:",
    ),
    "no driver in the container": (
        'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].',
        "could not select device driver",
    ),
    "kernel image": (
        v1(
            "Worker_TP0",
            traceback("torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device"),
        ),
        "no kernel image is available",
    ),
    "HIP": (
        printed("RayWorkerWrapper", traceback("RuntimeError: HIP error: invalid device function")),
        "HIP error: invalid device function",
    ),
    "ROCm page fault": (
        "Memory access fault by GPU node-2 (Agent handle: 0x5635e3db2590) on address 0x7f18972. Reason: Page not present.\n"
        "Fatal Python error: Aborted\n" + start_failed(),
        "Memory access fault by GPU node-2",
    ),
    "Triton": (
        v1("EngineCore", traceback("RuntimeError: Triton Error [CUDA]: device kernel image is invalid")),
        "Triton Error [CUDA]",
    ),
    "cuBLAS": (
        v1(
            "EngineCore",
            traceback("RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"),
        ),
        "CUBLAS_STATUS_NOT_INITIALIZED",
    ),
}

SERVING = {
    "illegal access of a worker": (
        v1(
            "Worker_TP1",
            f"WorkerProc hit an exception.\n{traceback(ILLEGAL)}{ADVICE}",
            source="multiproc_executor.py:596",
        )
        + "\n"
        + v1(
            "EngineCore_DP0",
            "EngineCore encountered a fatal error.\n"
            + traceback(
                "RuntimeError: Worker failed with error 'CUDA error: an illegal memory access was encountered', please check"
                " the stack trace above for the root cause"
            ),
        ),
        ILLEGAL,
    ),
    "device-side assert": (
        "/pytorch/aten/src/ATen/native/cuda/Indexing.cu:1284: indexSelectLargeIndex: block: [0,0,0], thread: [24,0,0]"
        " Assertion `srcIndex < srcSelectDimSize` failed.\n"
        + v1("EngineCore", traceback("RuntimeError: CUDA error: device-side assert triggered") + ADVICE),
        "Indexing.cu:1284: indexSelectLargeIndex",
    ),
    "custom all-reduce": (
        "Failed: Cuda error /workspace/csrc/custom_all_reduce.cuh:364 'an illegal memory access was encountered'",
        "Failed: Cuda error /workspace/csrc/custom_all_reduce.cuh:364",
    ),
    "a watchdog that says what it found": (
        "[rank1]:[E1112 09:49:50.783340025 ProcessGroupNCCL.cpp:1895] [PG ID 2 PG GUID 3 Rank 1] Process group watchdog"
        " thread terminated with exception: CUDA error: an illegal memory access was encountered\n"
        "frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x96\n"
        "terminate called after throwing an instance of 'c10::DistBackendError'\n"
        "Fatal Python error: Aborted",
        "Process group watchdog thread terminated with exception: CUDA error: an illegal memory access",
    ),
    "a watchdog's timeout, and then what it was": (
        "[rank2]:[E1112 09:49:50.78 ProcessGroupNCCL.cpp:616] [Rank 2] Watchdog caught collective operation timeout:"
        " WorkNCCL(SeqNum=1, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600097 milliseconds before timing out.\n"
        "[rank1]:[E1112 09:49:51.12 ProcessGroupNCCL.cpp:1895] [Rank 1] Process group watchdog thread terminated with"
        " exception: CUDA error: unspecified launch failure",
        "CUDA error: unspecified launch failure",
    ),
    "C++ without a prefix": (
        "terminate called after throwing an instance of 'c10::AcceleratorError'\n"
        "  what():  CUDA error: unspecified launch failure\nException raised from c10_cuda_check_implementation",
        "what():  CUDA error: unspecified launch failure",
    ),
    "Neuron": (
        v1(
            "EngineCore_DP0",
            traceback("RuntimeError: The following operation failed in the TorchScript interpreter.")
            + "\nTraceback of TorchScript (most recent call last):\n    out = self.model(inputs)\n"
            "RuntimeError: Failed to execute the model status=1006 message=Execution Out-Of-Bounds Memory Access",
        ),
        "Failed to execute the model status=1006",
    ),
    "V0 engine loop": (
        v0(
            'RuntimeError("Error in model execution: CUDA error: an illegal memory access was encountered")\n'
            + traceback("RuntimeError: CUDA error: an illegal memory access was encountered")
            + f"{ADVICE}\n{DIRECT}\n"
            + traceback("RuntimeError: Error in model execution: CUDA error: an illegal memory access was encountered")
        ),
        "CUDA error: an illegal memory access was encountered",
    ),
}


@pytest.mark.parametrize("name", STARTING)
def test_while_starting(name: str) -> None:
    log, cause = STARTING[name]
    crash = classify(log, exit_code=1)
    assert (crash.category, crash.phase) == (Category.CUDA_ERROR, "starting")
    assert cause in crash.evidence
    assert names_its_line(crash, log)


@pytest.mark.parametrize("name", SERVING)
def test_while_serving(name: str) -> None:
    log, cause = SERVING[name]
    log = f"{serving()}\n{log}\n{engine_dead()}"
    crash = classify(log, exit_code=0)
    assert (crash.category, crash.phase) == (Category.CUDA_ERROR, "serving")
    assert cause in crash.evidence
    assert names_its_line(crash, log)


def test_the_line_that_quotes_an_error_is_not_an_abort() -> None:
    crash = classify(f"{serving()}\n{SERVING['a watchdog that says what it found'][0]}", exit_code=-6)
    assert crash.process == "rank1"
    assert crash.line_number == 4
