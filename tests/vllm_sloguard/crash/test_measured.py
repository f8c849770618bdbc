"""Failures that were measured with vLLM 0.26 on an H200 and 0.32 on the CPU build, as their deciding lines."""

# ruff: noqa: E501 - the logs' own lines

import pytest
from vllm_logs import printed, start_failed, traceback, v1

from vllm_sloguard.crash import Category, classify

OOM, STARTUP = Category.OUT_OF_MEMORY, Category.STARTUP_FAILURE
INVALID = "pydantic_core._pydantic_core.ValidationError: 1 validation error for"


def invalid(config: str, message: str) -> str:
    return printed(
        "APIServer", f"{traceback(f'{INVALID} {config}')}\n  {message} [type=value_error, input_value=1]", pid=1
    )


def worker(exception: str) -> str:
    quote = exception.partition(": ")[2]
    failed = f"RuntimeError: Worker failed with error '{quote}', please check the stack trace above for the root cause"
    return "\n".join(
        [
            v1("Worker", f"WorkerProc hit an exception.\n{traceback(exception)}", source="multiproc_executor.py:1063"),
            v1("EngineCore", f"EngineCore failed to start.\n{traceback(failed)}", source="core.py:1510"),
            start_failed(),
        ]
    )


def engine(exception: str) -> str:
    return "\n".join([v1("EngineCore", f"EngineCore failed to start.\n{traceback(exception)}"), start_failed()])


MEASURED = {
    "CPU: batched tokens below sequences": (
        invalid(
            "SchedulerConfig",
            "Value error, max_num_batched_tokens (8) must be greater than or equal to max_num_seqs (16).",
        ),
        STARTUP,
        "must be greater than or equal to max_num_seqs (16)",
    ),
    "CPU: KV cache below one sequence": (
        engine(
            "ValueError: To serve at least one request with the model's max seq len (4096), (0.02 GiB KV cache is needed,"
            " which is larger than the available KV cache memory (0.01 GiB). Based on the available memory, the estimated"
            " maximum model length is 1792."
        ),
        OOM,
        "the estimated maximum model length is 1792",
    ),
    "CPU: KV space above memory": (
        worker(
            "ValueError: Available memory on node 0 (19.99/21.96 GiB) on kv cache allocation is less than requested memory"
            " for kv (64.0 GiB)."
        ),
        OOM,
        "less than requested memory for kv (64.0 GiB)",
    ),
    "CPU: length above the derived": (
        invalid(
            "ModelConfig",
            "Value error, User-specified max_model_len (8192) is greater than the derived max_model_len (2048).",
        ),
        STARTUP,
        "max_model_len (8192) is greater than the derived",
    ),
    "CPU: model missing": (
        traceback(
            "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name': '/nonexistent/model'."
        ),
        STARTUP,
        "HFValidationError: Repo id must be",
    ),
    "CPU: out of memory while loading, injected": (
        worker("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        OOM,
        "torch.OutOfMemoryError: CUDA out of memory",
    ),
    "CPU: three ranks for four heads": (
        invalid(
            "VllmConfig",
            "Value error, Total number of attention heads (4) must be divisible by tensor parallel size (3).",
        ),
        STARTUP,
        "must be divisible by tensor parallel size (3)",
    ),
    "CPU: unknown flag": ("api_server.py: error: unrecognized arguments: --no-such-flag", STARTUP, "--no-such-flag"),
    "H200: attention backend missing": (
        engine("ValueError: Selected backend AttentionBackendEnum.FLASHINFER is not valid for this configuration."),
        STARTUP,
        "FLASHINFER is not valid",
    ),
    "H200: batched tokens below the length": (
        invalid("SchedulerConfig", "Value error, max_num_batched_tokens (2048) is smaller than max_model_len (8192)."),
        STARTUP,
        "is smaller than max_model_len (8192)",
    ),
    "H200: block size 7": (
        engine("ValueError: No valid attention backend found for cuda with block_size=7"),
        STARTUP,
        "No valid attention backend found",
    ),
    "H200: free memory below utilization": (
        engine(
            "ValueError: Free memory on device cuda:0 (38.69/139.8 GiB) on startup is less than desired GPU memory"
            " utilization (0.92, 128.62 GiB)."
        ),
        OOM,
        "Free memory on device cuda:0 (38.69/139.8 GiB)",
    ),
    "H200: no sequences": (
        invalid("SchedulerConfig", "max_num_seqs\n  Input should be greater than or equal to 1"),
        STARTUP,
        "max_num_seqs Input should be greater than or equal to 1",
    ),
    "H200: no memory for cache blocks": (
        engine("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."),
        OOM,
        "No available memory for the cache blocks",
    ),
    "H200: quantization without a config": (
        engine("ValueError: Cannot find the config file for awq"),
        STARTUP,
        "config file for awq",
    ),
    "H200: two ranks on one GPU": (
        invalid(
            "ParallelConfig",
            "Value error, World size (2) is larger than the number of available GPUs (1) in this node.",
        ),
        STARTUP,
        "World size (2) is larger",
    ),
}


@pytest.mark.parametrize("name", MEASURED)
def test_measured(name: str) -> None:
    log, category, evidence = MEASURED[name]
    crash = classify(log, phase="starting", exit_code=1)
    assert crash.category is category
    assert evidence in crash.evidence
