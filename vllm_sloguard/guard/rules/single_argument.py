"""Rules about single arguments: their types, bounds and names."""

from collections.abc import Mapping

from vllm_sloguard.guard import memory
from vllm_sloguard.guard.rules import arguments
from vllm_sloguard.guard.rules.arguments import ARGUMENTS, ArgumentKind, display
from vllm_sloguard.guard.rules.rule import Broken, Case, Rule, Stage, Versions
from vllm_sloguard.knobs import KnobValues


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The names that 0.32 knows (vllm/config/cache.py, vllm/config/model.py, layers/quantization/__init__.py).
KV_CACHE_DTYPES = _words(
    "auto float16 bfloat16 fp8 fp8_e4m3 fp8_e5m2 fp8_inc fp8_ds_mla nvfp4_ds_mla turboquant_k8v4 turboquant_4bit_nc"
    " turboquant_k3v4_nc turboquant_3bit_nc ultraquant_4bit int4_per_token_head int8_per_token_head fp8_per_token_head"
    " nvfp4 nvfp4_4over6"
)
DTYPES = _words("auto half float16 bfloat16 float float32")
# Methods that quantize an ordinary checkpoint while loading it.
ONLINE_QUANTIZATION = _words(
    "fp8 humming experts_int8 mxfp4 gpt_oss_mxfp4 deepseek_v4_fp8 fp8_per_tensor fp8_per_block fp8_per_channel"
    " int8_per_channel_weight_only nvfp4_per_token mxfp8"
)
# Methods with parameters in the checkpoint; "online" needs them in the argument quantization_config.
CHECKPOINT_QUANTIZATION = _words(
    "awq auto_awq modelopt modelopt_fp4 modelopt_mxfp8 modelopt_mixed auto_gptq gptq gptq_marlin awq_marlin"
    " compressed-tensors quark moe_wna16 torchao inc"
)
DEPRECATED_QUANTIZATION = _words("fbgemm_fp8 fp_quant")
_NAMES: Mapping[str, frozenset[str]] = {
    "kv_cache_dtype": KV_CACHE_DTYPES,
    "dtype": DTYPES,
    "quantization": ONLINE_QUANTIZATION | CHECKPOINT_QUANTIZATION | DEPRECATED_QUANTIZATION | {"online"},
}
QUANTIZATION = _NAMES["quantization"]
_MOST = 2**63 - 1
# EngineArgs computes with these before pydantic reads them.
_EARLY = ("max_num_seqs", "max_num_batched_tokens", "pipeline_parallel_size")
# vLLM's lists change between versions.
_AS_IN_0_32 = Versions((0, 32), (0, 32))


def unreadable_argument(args: KnobValues) -> str:
    """An error for the first argument without a usable value; empty if there is none."""
    case = Case(args, None, None)
    for rule in (_READABLE, _NOT_NONE, _BITS, _BOUNDS):
        broken = rule.check(case)
        if broken is not None:
            return broken.reason
    return ""


def _readable(case: Case) -> Broken | None:
    for name, value in case.args.items():
        argument = ARGUMENTS.get(name)
        if argument is None or value is None:  # pyright: ignore[reportUnnecessaryComparison]
            continue
        if arguments.reading(name, value) is None:
            return Broken(f"{name} must be {argument.kind}, got {display(value)}")
    return None


def _not_none(case: Case) -> Broken | None:
    for name, value in case.args.items():
        if value is None:  # pyright: ignore[reportUnnecessaryComparison]
            default = ARGUMENTS[name].default
            return Broken(f"{name} must not be None", ((name, default),))
    return None


def _early_text(case: Case) -> Broken | None:
    """If both are given, arg_utils.py leaves max_num_seqs and max_num_batched_tokens to pydantic."""
    both = "max_num_seqs" in case.args and "max_num_batched_tokens" in case.args
    for name in _EARLY:
        value = case.args.get(name)
        if isinstance(value, str) and (name == "pipeline_parallel_size" or not both):
            reason = f"{name} is the string {display(value)}, not a number"
            return Broken(reason, ((name, arguments.reading(name, value)),))
    return None


def _early_world(case: Case) -> Broken | None:
    """The same for the default batch: 2048 times the string "2" is a number with 2048 digits."""
    value = case.args.get("tensor_parallel_size")
    if not isinstance(value, str) or ("max_num_seqs" in case.args and "max_num_batched_tokens" in case.args):
        return None
    reason = f"tensor_parallel_size is the string {display(value)}, not a number"
    return Broken(reason, (("tensor_parallel_size", arguments.reading("tensor_parallel_size", value)),))


def _early_bool(case: Case) -> Broken | None:
    """Any string counts as true when the default batch is chosen, but "false" as false afterwards."""
    value = case.args.get("enable_chunked_prefill")
    if not isinstance(value, str) or case.chunked or "max_num_batched_tokens" in case.args:
        return None
    if case.length is None or case.length <= memory.batched_tokens(case.values, case.machine):
        return None
    reason = f"enable_chunked_prefill is the string {display(value)}, which vLLM at first treats as true"
    return Broken(reason, (("enable_chunked_prefill", False),))


def _bits(case: Case) -> Broken | None:
    for name, argument in ARGUMENTS.items():
        value = case.number(name) if argument.kind is ArgumentKind.INT else None
        if value is not None and abs(value) > _MOST:
            return Broken(f"{name} does not fit into 64 bits: {display(value)}", ((name, argument.default),))
    return None


def _bounds(case: Case) -> Broken | None:
    """An out-of-range value shows no intent, so the default replaces it."""
    for name, argument in ARGUMENTS.items():
        value = case.number(name) if argument.kind is ArgumentKind.INT and name != "kv_cache_memory_bytes" else None
        if value is not None and value < argument.lowest:
            return Broken(f"{name} must be at least {argument.lowest}, got {value}", ((name, argument.default),))
    if case.number("max_model_len") == 0:
        return Broken("max_model_len must be above 0, or -1 for what fits", (("max_model_len", None),))
    share = case.values.get("gpu_memory_utilization")
    if share is not None and not 0 < float(share) <= 1:
        wanted = 1.0 if float(share) > 1 else memory.DEFAULT_UTILIZATION
        got = display(case.args["gpu_memory_utilization"])
        return Broken(f"gpu_memory_utilization must lie in (0, 1], got {got}", (("gpu_memory_utilization", wanted),))
    return None


def _kv_bytes(case: Case) -> Broken | None:
    kv = case.number("kv_cache_memory_bytes")
    if kv is None or kv > 0:
        return None
    return Broken(f"kv_cache_memory_bytes must be at least 1, got {kv}", (("kv_cache_memory_bytes", None),))


def _names(case: Case) -> Broken | None:
    for name, known in _NAMES.items():
        value = case.values.get(name)
        # Only quantization is case-insensitive.
        if value is not None and (str(value).lower() if name == "quantization" else value) not in known:
            reason = f"{name} {display(value)} is none of {', '.join(sorted(known))}"
            return Broken(reason, ((name, ARGUMENTS[name].default),))
    return None


_READABLE = Rule(
    "readable", "every argument has a value of its type, or one that converts to it", Stage.CONFIG, _readable
)
_NOT_NONE = Rule("not-none", "some arguments must not be None", Stage.CONFIG, _not_none)
_BITS = Rule("64-bits", "integers fit into 64 bits, like tensor sizes", Stage.START, _bits)
_BOUNDS = Rule("bounds", "numbers are within their bounds (Field(ge=..., gt=..., le=...))", Stage.CONFIG, _bounds)
ARGUMENT_RULES: tuple[Rule, ...] = (
    _READABLE,
    _NOT_NONE,
    Rule("early-text", "what EngineArgs computes with is not a string", Stage.CONFIG, _early_text, _AS_IN_0_32),
    Rule("early-world", "the default batch is multiplied by a number", Stage.START, _early_world, _AS_IN_0_32),
    _BITS,
    _BOUNDS,
    Rule("kv-bytes", "a stated KV cache is not empty", Stage.START, _kv_bytes),
    Rule(
        "early-bool",
        "chunked prefill is not a string where the default batch depends on it",
        Stage.CONFIG,
        _early_bool,
        _AS_IN_0_32,
    ),
    Rule("names", "kv_cache_dtype, dtype and quantization have known names", Stage.CONFIG, _names, _AS_IN_0_32),
)
