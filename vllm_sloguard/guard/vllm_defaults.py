"""vLLM's defaults for absent arguments, as far as memory depends on them.

``args`` are EngineArgs names; absent means vLLM's default. Sources are files of vLLM 0.26 to 0.32.
"""

import re

from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.model_shape import DTYPE_BYTES, ModelShape
from vllm_sloguard.knobs import KnobValues

GIB = 2**30
# vllm/config/cache.py.
DEFAULT_UTILIZATION = 0.92


def whole_number(args: KnobValues, name: str, default: int) -> int:
    """An integer of ``args``."""
    return int(args.get(name, default))


def tensor_parallel(args: KnobValues) -> int:
    """The number of ranks that share each layer."""
    return whole_number(args, "tensor_parallel_size", 1)


def pipeline_parallel(args: KnobValues) -> int:
    """The number of pipeline stages."""
    return whole_number(args, "pipeline_parallel_size", 1)


def batched_tokens(args: KnobValues, machine: Machine | None) -> int:
    """max_num_batched_tokens, or the API server's default for the machine (arg_utils.py, get_batch_defaults)."""
    stated = args.get("max_num_batched_tokens")
    if stated is not None:
        return int(stated)
    if machine is None:
        return 2048
    if machine.kind == "cpu":
        return 2048 * tensor_parallel(args) * pipeline_parallel(args)
    if machine.total_bytes >= 160 * GIB:
        return 16384
    return 8192 if _large(machine) else 2048


def step_tokens(shape: ModelShape, args: KnobValues, machine: Machine) -> int:
    """Tokens of the largest step: ``batched_tokens``, whose default vLLM adapts to the requests.

    It is raised to the length if prompts are not split, and capped at the total of all sequences (arg_utils.py,
    _set_default_max_num_seqs_and_batched_tokens_args).
    """
    tokens, length = batched_tokens(args, machine), max_model_len(shape, args)
    if args.get("max_num_batched_tokens") is not None or length is None:
        return tokens
    if args.get("enable_chunked_prefill") is False:
        tokens = max(tokens, length)
    return min(tokens, sequences(args, machine) * length)


def sequences(args: KnobValues, machine: Machine) -> int:
    """max_num_seqs, or the API server's default for the machine, which is at most a stated batch (same function)."""
    stated = args.get("max_num_seqs")
    if stated is not None:
        return int(stated)
    if machine.kind == "cpu":
        default = 128 * tensor_parallel(args) * pipeline_parallel(args)
    else:
        default = 1024 if _large(machine) else 256
    return min(default, whole_number(args, "max_num_batched_tokens", default))


def _large(machine: Machine) -> bool:
    return machine.total_bytes >= 160 * GIB or (
        machine.total_bytes >= 70 * GIB and "a100" not in machine.source.lower()
    )


def steps_in_flight(args: KnobValues, machine: Machine) -> int:
    """Concurrent batches: one per stage, and one more with asynchronous scheduling.

    That is the default except on the CPU (config/vllm.py, max_concurrent_batches, with model runner V2).
    """
    asynchronous = machine.kind == "cuda" and args.get("async_scheduling") is not False
    return pipeline_parallel(args) + (1 if asynchronous else 0)


def capture_sizes(args: KnobValues, machine: Machine) -> tuple[int, ...]:
    """Batch sizes, in tokens, for which CUDA graphs are captured (config/vllm.py, _set_cudagraph_sizes).

    Empty in eager mode and on the CPU. By default 1, 2, 4, then in steps of 8 up to 256 and of 16 up to the largest,
    which is twice max_num_seqs and at most 512 (1024 on data-center Blackwell, which is ignored here).
    """
    if machine.kind == "cpu" or args.get("enforce_eager"):
        return ()
    batch = batched_tokens(args, machine)
    if "cudagraph_capture_sizes" in args:
        # A list, or a list as JSON.
        stated = {int(digits) for digits in re.findall(r"\d{1,9}", str(args["cudagraph_capture_sizes"]))}
        return tuple(sorted(size for size in stated if 0 < size <= batch))
    largest = whole_number(args, "max_cudagraph_capture_size", min(2 * sequences(args, machine), 512))
    # More than a few hundred graphs are not plausible, so the rest is ignored.
    largest = min(largest, batch, 2**14)
    return tuple(size for size in (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)) if size <= largest)


def max_model_len(shape: ModelShape | None, args: KnobValues) -> int | None:
    """The longest request, tokens; None if unknown or left to vLLM (-1)."""
    stated = args.get("max_model_len")
    if stated is not None:
        return None if stated == -1 else int(stated)
    return (shape.default_model_len or shape.max_model_len) if shape is not None else None


def block_size(shape: ModelShape, args: KnobValues, machine: Machine) -> int:
    """Tokens per KV block: as stated, else 16, or 128 on the CPU (platforms/cpu.py).

    The CPU's reference MLA always uses 16, its AMX one the stated size; which one runs is unknown here.
    """
    if machine.kind == "cpu" and shape.mla:
        return 16
    return whole_number(args, "block_size", 128 if machine.kind == "cpu" else 16)


def dtype_bytes(shape: ModelShape, args: KnobValues) -> int:
    """Width of weights and activations; with "auto" vLLM halves a float32 model (config/model.py)."""
    return DTYPE_BYTES.get(str(args.get("dtype", "auto")), min(2, shape.dtype_bytes))
