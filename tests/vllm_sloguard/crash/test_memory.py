"""Memory failures of every device, of the host and of shared memory, in all their wordings."""

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

CUDA_OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 80.00 MiB. GPU 0 has a total capacity of 79.11 GiB"
    " of which 60.69 MiB is free. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF"
)
NO_BLOCKS = (
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing"
    " the engine."
)
QUOTING_SOURCE = 'raise ValueError("No available memory for the cache blocks. "'

# (log, a part of the cause line)
STARTING = {
    "V0 behind compose": (
        prefixed(
            "vllm-1  | ",
            v0(f"{NO_BLOCKS.partition(': ')[2]}\n{traceback(NO_BLOCKS, QUOTING_SOURCE)}")
            + "\nProcess SpawnProcess-1:\n"
            + traceback("RuntimeError: Engine process failed to start. See stack trace for the root cause."),
        ),
        NO_BLOCKS,
    ),
    "source line first": (
        v1("EngineCore_DP0", f"EngineCore failed to start.\n{traceback(NO_BLOCKS, QUOTING_SOURCE)}")
        + "\n"
        + start_failed(),
        NO_BLOCKS,
    ),
    "max seq len, older wording": (
        v0(
            traceback(
                "ValueError: The model's max seq len (32768) is larger than the maximum number of tokens that can be"
                " stored in KV cache (7344). Try increasing `gpu_memory_utilization` or decreasing `max_model_len`"
            )
        ),
        "max seq len (32768) is larger than the maximum number of tokens",
    ),
    "max seq len, models's": (
        v08(
            traceback(
                "ValueError: To serve at least one request with the models's max seq len (1048576), (24.00 GiB KV cache"
                " is needed, which is larger than the available KV cache memory (9.97 GiB). Based on the available"
                " memory, the estimated maximum model length is 435344."
            )
        ),
        "models's max seq len (1048576)",
    ),
    "HIP": (
        v1(
            "EngineCore_DP0", traceback("torch.OutOfMemoryError: HIP out of memory. Tried to allocate 64.00 MiB. GPU 0")
        ),
        "HIP out of memory. Tried to allocate 64.00 MiB.",
    ),
    "XPU": (
        printed("Worker_TP1", traceback("torch.OutOfMemoryError: XPU out of memory. Tried to allocate 1.50 GiB.")),
        "XPU out of memory",
    ),
    "Level Zero": (
        v1(
            "EngineCore",
            traceback("RuntimeError: level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        ),
        "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    ),
    "NPU": (
        v1(
            "EngineCore_DP0",
            traceback("RuntimeError: NPU out of memory. Tried to allocate 1.16 GiB (NPU 0; 60.97 GiB total)"),
        ),
        "NPU out of memory",
    ),
    "TPU": (
        v1(
            "EngineCore",
            traceback(
                "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm."
            ),
        ),
        "RESOURCE_EXHAUSTED",
    ),
    "mmap of the weights": (
        v1(
            "EngineCore",
            traceback(
                "RuntimeError: unable to mmap 16933256392 bytes from file <model-00001.safetensors>: Cannot allocate memory (12)"
            ),
        ),
        "unable to mmap 16933256392 bytes",
    ),
    "shared memory behind NCCL": (
        v1(
            "Worker_TP1",
            traceback(
                "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error,"
                " NCCL version 2.27.3"
            )
            + "\nncclSystemError: System call (e.g. socket, malloc) or external library call failed.\nLast error:\n"
            "Error while creating shared memory segment /dev/shm/nccl-Gb5uHx (size 33030528), error: No space left on"
            " device (28)",
            source="multiproc_executor.py:600",
        ),
        "Error while creating shared memory segment /dev/shm/nccl-Gb5uHx",
    ),
    "GPU memory behind NCCL": (
        v1(
            "Worker_TP0",
            traceback(
                "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1970, unhandled cuda error"
                " (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5"
            )
            + "\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 'out of memory'",
        ),
        "Cuda failure 'out of memory'",
    ),
    "NCCL's own line first": (
        "node1:52:310 [0] NCCL INFO Bootstrap : Using eth0\n"
        "node1:52:310 [0] alloc.h:57 NCCL WARN Cuda failure 2 'out of memory'\n"
        + printed("Worker_TP0", traceback("RuntimeError: NCCL error: unhandled cuda error")),
        "Cuda failure 2 'out of memory'",
    ),
    "warm-up of the sampler": (
        v1(
            "EngineCore",
            f"{traceback(CUDA_OOM)}\n{DIRECT}\n"
            + traceback(
                "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try"
                " lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine."
            ),
        ),
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 80.00 MiB.",
    ),
    "memory profiling": (
        v08(
            traceback(
                "AssertionError: Error in memory profiling. Initial free memory 10.0 GiB, current free memory 20.0 GiB"
            )
        ),
        "Error in memory profiling",
    ),
    "kernel of the host": (
        v1("EngineCore", "Loading weights", level="INFO")
        + "\n[ 8231.1] Out of memory: Killed process 4711 (VLLM::EngineCor) total-vm:91231232kB\n"
        + start_failed(failed="{'EngineCore_DP0': -9}"),
        "Out of memory: Killed process 4711",
    ),
    "exit 137 of a container": (
        prefixed("vllm-1  | ", v1("EngineCore", "Starting to load model", level="INFO"))
        + "\nvllm-1 exited with code 137",
        "vllm-1 exited with code 137",
    ),
    "kubectl describe": (
        "    Last State:     Terminated\n      Reason:       OOMKilled\n      Exit Code:    137",
        "OOMKilled",
    ),
    "killed by the shell's word": (
        v1("EngineCore", "Starting to load model", level="INFO")
        + "\n./serve.sh: line 12:  4711 Killed   vllm serve /models/x",
        "4711 Killed",
    ),
    "Slurm": (
        v1("EngineCore", "Loading weights", level="INFO")
        + "\nslurmstepd: error: Detected 1 oom_kill event in StepId=42.0. Some of the step tasks have been OOM Killed.\n"
        "srun: error: gpu03: task 0: Out Of Memory",
        "Detected 1 oom_kill event",
    ),
    "Ray's memory monitor": (
        "(raylet) [2026-09-05 10:00:00,123 E 80 80] (raylet) node_manager.cc:3064: 1 Workers (tasks / actors) killed due"
        " to memory pressure (OOM), 0 Workers crashed due to other reasons\n" + start_failed(),
        "killed due to memory pressure (OOM)",
    ),
    "Ray's wrapper before the worker's line": (
        v0("Error executing method 'load_model'. This might cause deadlock.", source="worker_base.py:560")
        + "\nray.exceptions.RayTaskError(OutOfMemoryError): ray::RayWorkerWrapper.execute_method() (pid=7)\n"
        + '  File "/usr/lib/vllm/worker.py", line 7, in load\n    model()\n'
        + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB.",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB.",
    ),
    "swap space": (
        v0(traceback("ValueError: Too large swap space. 8.00 GiB out of the 7.76 GiB total CPU memory is allocated")),
        "Too large swap space",
    ),
    "cumem allocator": (
        printed("EngineCore", "CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62")
        + "\n"
        + start_failed(),
        "CUDA Error: out of memory at",
    ),
    "C++ allocation": (
        "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n" + start_failed(),
        "std::bad_alloc",
    ),
    "one line, from a paste": (
        "(EngineCore pid=7) ERROR 07-04 14:53:21 [engine.py:458] HIP out of memory. Tried to allocate 64.00 MiB. GPU 0 has a"
        ' total capacity of 23.98 GiB. (EngineCore pid=7) ERROR 07-04 14:53:23 [engine.py:458] File "/app/x.py", line 7,'
        " in run (EngineCore pid=7) ERROR 07-04 14:53:23 [engine.py:458] RuntimeError: Engine core initialization"
        " failed. See root cause above.",
        "HIP out of memory. Tried to allocate 64.00 MiB.",
    ),
    "wrapped at the width of a terminal": (
        "(EngineCore_DP0 pid=59619) ERROR 10-15 08:32:29 [core.py:708] ValueError: No available mem\n"
        "ory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the en\ngine.\n"
        + start_failed(),
        "No available memory for the cache blocks",
    ),
}

SERVING = {
    "under load": (
        f"{serving()}\n"
        + v1("EngineCore_DP0", f"EngineCore encountered a fatal error.\n{traceback(CUDA_OOM)}")
        + f"\n{engine_dead()}",
        CUDA_OOM[:90],
    ),
    "V0 worker": (
        f"{serving()}\n"
        + v0(
            "Exception in worker VllmWorkerProcess while processing method execute_model: CUDA out of memory. Tried to"
            f" allocate 2.00 GiB, {traceback('torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB')}",
            process="VllmWorkerProcess",
            source="multiproc_worker_utils.py:226",
        ),
        "CUDA out of memory. Tried to allocate 2.00 GiB",
    ),
}


@pytest.mark.parametrize("name", STARTING)
def test_while_starting(name: str) -> None:
    log, cause = STARTING[name]
    for phase in ("starting", None):
        crash = classify(log, phase=phase, exit_code=1)
        assert crash.category is Category.OUT_OF_MEMORY
        assert cause in crash.evidence
        assert names_its_line(crash, log)


@pytest.mark.parametrize("name", SERVING)
def test_while_serving(name: str) -> None:
    log, cause = SERVING[name]
    crash = classify(log, exit_code=None)
    assert (crash.category, crash.phase) == (Category.OUT_OF_MEMORY, "serving")
    assert cause in crash.evidence
    assert names_its_line(crash, log)


def test_an_exit_code_of_137_is_a_memory_limit() -> None:
    crash = classify("INFO: loading", phase="starting", exit_code=137)
    assert crash.category is Category.OUT_OF_MEMORY
    assert (
        crash.evidence
        == "exit code 137, 128 + SIGKILL, often the kernel's when memory runs out; nothing in the log says why"
    )
