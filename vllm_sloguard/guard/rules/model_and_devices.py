"""Rules that check arguments against the model and the devices: ranks, dtypes, block size, the model's length."""

import math

from vllm_sloguard.guard.rules.arguments import display
from vllm_sloguard.guard.rules.rule import Broken, Case, Rule, Stage, Versions
from vllm_sloguard.guard.rules.single_argument import (
    CHECKPOINT_QUANTIZATION,
    DEPRECATED_QUANTIZATION,
    ONLINE_QUANTIZATION,
)

_AS_IN_0_32 = Versions((0, 32), (0, 32))


def _heads(case: Case) -> Broken | None:
    ranks, shape = case.number("tensor_parallel_size") or 1, case.shape
    # A shape of which only the sizes are known has no heads to divide.
    if shape is None or shape.stated_weights_bytes is not None or shape.heads % ranks == 0:
        return None
    heads = shape.heads
    reason = f"{heads} attention heads cannot be divided over tensor_parallel_size {ranks}"
    return Broken(reason, (("tensor_parallel_size", _divisor(heads, ranks)),))


def _divisor(heads: int, most: int) -> int:
    """The largest number of ranks, ``most`` at most, that divides the heads."""
    return next(ranks for ranks in range(min(heads, most), 0, -1) if heads % ranks == 0)


def _devices(case: Case) -> Broken | None:
    """config/parallel.py, __post_init__; other executors or nodes may have devices that are not visible here."""
    machine = case.machine
    if machine is None or machine.kind != "cuda" or machine.gpus < 1 or case.shape is None:
        return None
    if any(name in case.args for name in ("distributed_executor_backend", "nnodes", "data_parallel_backend")):
        return None
    tensor, pipeline = case.number("tensor_parallel_size") or 1, case.number("pipeline_parallel_size") or 1
    if tensor * pipeline <= machine.gpus:
        return None
    reason = f"tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline} is above the {machine.gpus} GPUs here"
    stages, ranks = machine.gpus // tensor, machine.gpus // pipeline
    ways = (
        *((("pipeline_parallel_size", stages),) if stages else ()),
        *((("tensor_parallel_size", _divisor(case.shape.heads, ranks)),) if ranks else ()),
        *((("pipeline_parallel_size", 1),) if not stages and pipeline > 1 else ()),
        *((("tensor_parallel_size", 1),) if not ranks and tensor > 1 else ()),
    )
    return Broken(reason, ways)


def _deprecated(case: Case) -> Broken | None:
    method = str(case.values.get("quantization", "")).lower()
    if method not in DEPRECATED_QUANTIZATION or case.args.get("allow_deprecated_quantization"):
        return None
    return Broken(f"quantization {method} is deprecated: vLLM refuses it", (("quantization", None),))


def _checkpoint(case: Case) -> Broken | None:
    """model_loader/weight_utils.py, get_quant_config. Such a checkpoint names its method in config.json."""
    method = str(case.values.get("quantization", "")).lower()
    if method == "online" and "quantization_config" not in case.args:
        return Broken("quantization online needs quantization_config", (("quantization", None),))
    if method not in CHECKPOINT_QUANTIZATION or case.shape is None or case.shape.quantization is not None:
        return None
    return Broken(f"quantization {method} needs a checkpoint quantized with it", (("quantization", None),))


def _quantized_dtype(case: Case) -> Broken | None:
    """config/vllm.py, _get_quantization_config."""
    method, dtype = str(case.values.get("quantization", "")).lower(), str(case.values.get("dtype", "auto"))
    if method not in ONLINE_QUANTIZATION:
        return None
    if method == "gpt_oss_mxfp4" and dtype in ("half", "float16"):
        return Broken(f"quantization {method} needs bfloat16, not dtype {dtype}", (("dtype", "bfloat16"),))
    if dtype not in ("float", "float32"):
        return None
    reason = f"quantization {method} needs 16-bit activations, not dtype {dtype}"
    return Broken(reason, (("dtype", "bfloat16"), ("quantization", None)))


def _mla_cache(case: Case) -> Broken | None:
    """config/vllm.py, validate_nvfp4_kv_cache_with_mla."""
    kind = str(case.values.get("kv_cache_dtype", "auto"))
    if case.shape is None or not case.shape.mla or not kind.startswith("nvfp4") or kind.endswith("_ds_mla"):
        return None
    return Broken(f"kv_cache_dtype {kind} does not store MLA's latent vectors", (("kv_cache_dtype", "auto"),))


def _derived_length(case: Case) -> Broken | None:
    """config/model.py, _get_and_verify_max_len; VLLM_ALLOW_LONG_MAX_MODEL_LEN lifts it: pass a shape without length."""
    longest, stated = case.shape.max_model_len if case.shape else None, case.number("max_model_len")
    if longest is None or stated is None or stated <= longest:
        return None
    return shorter(case, longest, f"max_model_len {display(stated)} is above the model's longest, {longest}")


def shorter(case: Case, length: int, reason: str) -> Broken:
    """A broken rule, fixed by a max_model_len of ``length`` tokens if that is enough for the workload."""
    if length < max(1, case.workload_max_len):
        return Broken(f"{reason}; the workload needs {case.workload_max_len}" if case.workload_max_len else reason)
    return Broken(reason, (("max_model_len", length),))


def _blocks(case: Case) -> Broken | None:
    """CPU attention requires multiples of 32 (tested: 16 fails), all CUDA backends multiples of 16 (tested: 7 fails).

    The reference MLA of the CPU overrides the size instead.
    """
    size, machine = case.number("block_size"), case.machine
    if size is None or machine is None or (machine.kind == "cpu" and case.shape is not None and case.shape.mla):
        return None
    unit = 32 if machine.kind == "cpu" else 16
    if size % unit == 0:
        return None
    wanted = math.ceil(size / unit) * unit
    return Broken(f"block_size {size} is not a multiple of {unit} on {machine.kind}", (("block_size", wanted),))


MODEL_RULES: tuple[Rule, ...] = (
    Rule("heads", "tensor_parallel_size divides the attention heads", Stage.CONFIG, _heads),
    Rule("devices", "every rank has a GPU", Stage.CONFIG, _devices),
    Rule("deprecated", "deprecated quantization is explicitly allowed", Stage.CONFIG, _deprecated, _AS_IN_0_32),
    Rule("checkpoint", "the checkpoint has the stated quantization", Stage.CONFIG, _checkpoint, _AS_IN_0_32),
    Rule("quantized-dtype", "the quantization method supports the dtype", Stage.CONFIG, _quantized_dtype, _AS_IN_0_32),
    Rule("mla-cache", "the attention supports the KV cache's dtype", Stage.CONFIG, _mla_cache, _AS_IN_0_32),
    Rule("derived-length", "max_model_len is at most the model's own", Stage.CONFIG, _derived_length),
    Rule("blocks", "the attention kernels support the block size", Stage.START, _blocks),
)
