"""Starts that fail for another reason than memory, the GPU or a deadline."""

# ruff: noqa: E501 - the logs' own lines

import pytest
from vllm_logs import DIRECT, HANDLING, names_its_line, prefixed, printed, serving, start_failed, traceback, v0, v08, v1

from vllm_sloguard.crash import Category, classify

UNKNOWN_MODEL = (
    "ValueError: The checkpoint you are trying to load has model type `qwen9` but Transformers does not recognize this"
    " architecture."
)

LOGS = {
    "pydantic with a header": (
        printed(
            "APIServer",
            traceback("pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig")
            + "\n  Value error, Total number of attention heads (64) must be divisible by tensor parallel size (3)."
            " [type=value_error, input_value=ArgsKwargs((), {...}), input_type=ArgsKwargs]"
            "\n    For further information visit https://errors.pydantic.dev/2.12/v/value_error",
            pid=1,
        ),
        "Value error, Total number of attention heads (64) must be divisible by tensor parallel size (3).",
    ),
    "pydantic without a header": (
        "  Value error, Total number of attention heads (64) must be divisible by tensor parallel size (3)."
        " [type=value_error, input_value=ArgsKwargs((), {})]",
        "Value error, Total number of attention heads (64) must be divisible by tensor parallel size (3).",
    ),
    "two fields": (
        traceback("pydantic_core._pydantic_core.ValidationError: 2 validation errors for CacheConfig")
        + "\ngpu_memory_utilization\n  Input should be less than or equal to 1 [type=less_than_equal, input_value=90]",
        "2 validation errors for CacheConfig: gpu_memory_utilization Input should be less than or equal to 1",
    ),
    "unknown flag": (
        "usage: vllm serve [model_tag] [options]\nvllm: error: unrecognized arguments: --max-len",
        "--max-len",
    ),
    "invalid choice": (
        "vllm serve: error: argument --dtype: invalid choice: 'fp4' (choose from 'auto', 'half')",
        "argument --dtype: invalid choice",
    ),
    "architecture": (
        v1(
            "APIServer",
            traceback("ValueError: Model architectures ['FooForCausalLM'] are not supported for now."),
            pid=1,
        ),
        "['FooForCausalLM'] are not supported for now",
    ),
    "kernel resources": (
        "triton.runtime.errors.OutOfResources: out of resource: shared memory,\nRequired: 90112, Hardware limit: 65536.",
        "OutOfResources: out of resource: shared memory",
    ),
    "inspection": (
        v0(
            "Error in inspecting model architecture 'LlamaForCausalLM'\n"
            + traceback(
                "subprocess.CalledProcessError: Command '['python3', '-m', 'registry']' returned non-zero exit status 1."
            )
            + f"\n{DIRECT}\n"
            + traceback("RuntimeError: Error raised in subprocess:")
            + "\n/usr/lib/python3/runpy.py: RuntimeWarning: found in sys.modules",
            source="registry.py:267",
        )
        + "\n"
        + traceback("ValueError: Model architectures ['LlamaForCausalLM'] are not supported for now."),
        "Error in inspecting model architecture 'LlamaForCausalLM'",
    ),
    "forked CUDA": (
        v0(
            traceback(
                "RuntimeError: Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must"
                " use the 'spawn' start method"
            ),
            process="VllmWorkerProcess",
            source="multiproc_worker_utils.py:233",
        ),
        "Cannot re-initialize CUDA in forked subprocess",
    ),
    "terse lookup, then the message": (
        traceback("KeyError: 'qwen9'", "config_class = CONFIG_MAPPING[model_type]")
        + f"\n{HANDLING}\n"
        + traceback(UNKNOWN_MODEL),
        UNKNOWN_MODEL,
    ),
    "first of a chain": (
        traceback("ModuleNotFoundError: No module named 'flash_attn'")
        + f"\n{DIRECT}\n"
        + traceback("RuntimeError: Failed to import the attention backend"),
        "No module named 'flash_attn'",
    ),
    "gated model": (
        traceback("huggingface_hub.errors.GatedRepoError: 401 Client Error. Cannot access gated repo")
        + f"\n{DIRECT}\n"
        + traceback("OSError: You are trying to access a gated repo."),
        "GatedRepoError: 401 Client Error",
    ),
    "an exception that names another": (
        v08(
            traceback("torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised:")
            + "\nImportError: cannot import name 'triton_key' from 'triton.compiler.compiler'\n\nSet TORCH_LOGS=+dynamo"
        ),
        "raised: ImportError: cannot import name 'triton_key'",
    ),
    "message on the next line": (
        traceback("ImportError: ") + "\nXLMRobertaConverter requires the protobuf library but it was not found.",
        "requires the protobuf library",
    ),
    "compiler": (
        v1("EngineCore", "EngineCore failed to start.")
        + "\n/tmp/tmp4x/main.c:6:10: fatal error: Python.h: No such file or directory\ncompilation terminated.\n"
        + v1(
            "EngineCore",
            traceback("subprocess.CalledProcessError: Command '['/usr/bin/gcc']' returned non-zero exit status 1."),
        ),
        "fatal error: Python.h: No such file or directory",
    ),
    "a command that printed nothing": (
        printed(
            "EngineCore_DP0",
            traceback("subprocess.CalledProcessError: Command '['neuron-cc']' died with <Signals.SIGHUP: 1>."),
        )
        + "\n"
        + start_failed(),
        "Command '['neuron-cc']' died with <Signals.SIGHUP: 1>.",
    ),
    "a warning of torch in front": (
        "[rank2]:[W801 01:30:29.84 TCPStore.cpp:125] [c10d] recvValue failed on SocketImpl(fd=7): Connection reset by peer\n"
        + start_failed(),
        "Engine core initialization failed.",
    ),
    "Slurm's exit code": (
        printed("APIServer", traceback("RuntimeError: no topology; pass --numa-bind-nodes"))
        + "\nsrun: error: gpu03: task 0: Exited with exit code 1",
        "no topology; pass --numa-bind-nodes",
    ),
    "worker of the V1 engine": (
        v1(
            "Worker_TP1",
            f"WorkerProc failed to start.\n{traceback(chr(75) + 'eyError: ' + repr('layers.0.mlp.up'))}",
            source="multiproc_executor.py:559",
        )
        + "\n"
        + v1(
            "EngineCore_DP0",
            "EngineCore failed to start.\n"
            + traceback(
                "Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause."
            ),
        )
        + "\n"
        + start_failed(),
        "KeyError: 'layers.0.mlp.up'",
    ),
    "nested processes in the prefix": (
        prefixed("(APIServer pid=716) ", v1("EngineCore_DP0", traceback("ValueError: Unsupported GPTQ group size 96"))),
        "Unsupported GPTQ group size 96",
    ),
    "lost indentation": (
        "ERROR 03-02 17:57:30 [engine.py:400] Traceback (most recent call last):\n"
        'ERROR 03-02 17:57:30 [engine.py:400] File "/src/vllm/engine.py", line 391, in run_mp_engine\n'
        "ERROR 03-02 17:57:30 [engine.py:400] raise ValueError(\n"
        "ERROR 03-02 17:57:30 [engine.py:400] ^^^^^^^^^^^^^^^^^\n"
        "ERROR 03-02 17:57:30 [engine.py:400] ValueError: Unsupported sequence of layers",
        "ValueError: Unsupported sequence of layers",
    ),
    "too few GPUs in Ray": (
        v08(
            traceback(
                "ValueError: The number of required GPUs exceeds the total number of available GPUs in the placement group."
            )
        ),
        "exceeds the total number of available GPUs",
    ),
    "journald": (
        prefixed(
            "Sep 05 10:00:12 gpu7 vllm[812]: ",
            traceback("OSError: Error no file named model.safetensors found in /models/x"),
        ),
        "OSError: Error no file named model.safetensors",
    ),
    "kubectl with pod names": (
        prefixed("[pod/vllm-7f9c/server] ", v1("EngineCore", traceback("AssertionError: hidden size 100 % 16 != 0"))),
        "AssertionError: hidden size 100 % 16 != 0",
    ),
    "Docker's JSON": (
        "\n".join(
            f'{{"log":"{line}\\n","stream":"stderr","time":"2026-09-05T10:00:00Z"}}'
            for line in (
                "Traceback (most recent call last):",
                "    run()",
                "ValueError: dtype bfloat16 is not supported on CPU",
            )
        ),
        "ValueError: dtype bfloat16 is not supported on CPU",
    ),
    "no error but a line that says so": (
        "(EngineCore pid=7) INFO 11-22 05:29:01 [core.py:9] loading\n"
        "(EngineCore pid=7) ERROR 11-22 05:29:02 [loader.py:9] Shard 3 of the checkpoint has a wrong checksum\n"
        + start_failed(),
        "Shard 3 of the checkpoint has a wrong checksum",
    ),
    "a traceback on one line": (
        'Traceback (most recent call last): File "/usr/bin/vllm", line 8, in <module> sys.exit(main()) File'
        ' "/usr/lib/vllm/cli.py", line 54, in main raise ValueError( ValueError: Unknown quantization method: fp3',
        "ValueError: Unknown quantization method: fp3",
    ),
}


@pytest.mark.parametrize("name", LOGS)
def test_while_starting(name: str) -> None:
    log, cause = LOGS[name]
    for phase in ("starting", None):
        crash = classify(log, phase=phase, exit_code=1)
        assert (crash.category, crash.phase) == (Category.STARTUP_FAILURE, "starting")
        assert cause in crash.evidence
        assert names_its_line(crash, log)


def test_a_port_taken_after_startup_is_a_failed_start() -> None:
    log = (
        f"{serving()}\nERROR:    [Errno 98] error while attempting to bind on address ('0.0.0.0', 44319): [errno 98]"
        " address already in use\nINFO:     Waiting for application shutdown."
    )
    crash = classify(log, phase="serving", exit_code=1)
    assert crash.category is Category.STARTUP_FAILURE
    assert crash.evidence.startswith("[Errno 98] error while attempting to bind on address ('0.0.0.0', 44319)")


def test_a_validation_error_ends_where_another_record_starts() -> None:
    text = (
        traceback("pydantic_core.ValidationError: 1 validation error for ModelConfig") + "\n  Value error, no such file"
    )
    crash = classify(f"{text}\nERROR:root:Exiting", exit_code=1)
    assert crash.evidence == "1 validation error for ModelConfig: Value error, no such file"


def test_the_line_number_of_a_validation_error_is_its_message() -> None:
    crash = classify(LOGS["pydantic with a header"][0], exit_code=1)
    assert crash.line_number == 5
    assert crash.evidence.startswith("1 validation error for VllmConfig: Value error, ")
