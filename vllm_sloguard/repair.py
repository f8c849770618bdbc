"""Turns a configuration that vLLM would not start with into the nearest one that it would, or says why there is none.

Each rule looks at the whole configuration and says what is broken and which single arguments would mend it, best first.
The first broken rule is mended and all are asked again, until none complains: what comes back therefore passes
unchanged when repaired again. A rule stands here only if vLLM (0.26 to 0.32) refuses to start where it is broken.
Two repairs of the SLO-Guard study are left out for that reason: chunked prefill together with eager mode, which vLLM
allows, and sequences times length within 0.7 of the KV tokens, beyond which it preempts instead of failing.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from vllm_sloguard import memory
from vllm_sloguard.knobs import Config, Value
from vllm_sloguard.machine import Machine
from vllm_sloguard.memory import GIB, Budget
from vllm_sloguard.model_shape import ModelShape

Estimate = Callable[[ModelShape, Config, Machine], Budget]


class Status(StrEnum):
    """What became of a configuration."""

    UNCHANGED = "unchanged"
    REPAIRED = "repaired"
    REFUSED = "refused"


@dataclass(frozen=True)
class Limits:
    """What crashes on this host taught: see ``learned``. ``headroom_bytes`` stays free beside vLLM's share."""

    max_model_len: int | None = None
    free_bytes: int | None = None
    headroom_bytes: int = 0


@dataclass(frozen=True)
class Change:
    """One argument that was changed; None means absent, so vLLM's default."""

    name: str
    before: Value | None
    after: Value | None
    reason: str


@dataclass(frozen=True)
class Repair:
    """The outcome. ``args`` are the given ones unless repaired; ``budget`` needs a shape and a machine."""

    status: Status
    args: Config
    changes: tuple[Change, ...]
    refusal: str
    budget: Budget | None


@dataclass(frozen=True)
class _Case:
    """What a rule looks at."""

    args: Config
    shape: ModelShape | None
    machine: Machine | None
    workload_max_len: int
    estimate: Estimate
    limits: Limits

    def number(self, name: str) -> int | None:
        value = self.args.get(name)
        return None if value is None else int(value)

    @property
    def length(self) -> int | None:
        """The length that vLLM's scheduler checks against; -1 stands for the model's longest there."""
        stated = self.number("max_model_len")
        if stated is not None and stated > 0:
            return stated
        return self.shape.max_model_len if self.shape else None

    @property
    def budget(self) -> Budget | None:
        return self.estimate(self.shape, self.args, self.machine) if self.shape and self.machine else None


@dataclass(frozen=True)
class _Broken:
    """A broken rule and the arguments that would mend it; no ways means that nothing does."""

    reason: str
    ways: tuple[tuple[str, Value | None], ...] = ()


# The bounds that vLLM puts on single numbers.
_LOWEST: Mapping[str, int] = {
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "max_model_len": -1,
    "block_size": 1,
    "kv_cache_memory_bytes": 1,
    "long_prefill_token_threshold": 0,
    "stream_interval": 1,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
}
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(_LOWEST, int),
    "gpu_memory_utilization": (int, float),
    **dict.fromkeys(("enforce_eager", "enable_chunked_prefill", "enable_prefix_caching"), bool),
    **dict.fromkeys(("kv_cache_dtype", "dtype", "quantization"), str),
}
# Every argument that a rule looks at.
TUNED: tuple[str, ...] = tuple(_TYPES)
# EngineArgs takes no None for these; the lowest value is the default, and for the share there is one of its own.
_NEVER_NONE = frozenset(
    {"long_prefill_token_threshold", "stream_interval", "tensor_parallel_size", "pipeline_parallel_size"}
)
# The estimate's own error: within this share of the fixed memory, vLLM and not the estimate decides.
_SLACK = 0.03
# Left free when a share is lowered: the engine's processes and CUDA context take some before vLLM looks.
_MARGIN_SHARE, _MARGIN_BYTES = 0.01, int(0.75 * GIB)
# Every rule moves an argument in one direction, so far fewer rounds than this are ever needed.
_ROUNDS = 64


def repair(
    args: Config,
    shape: ModelShape | None,
    machine: Machine | None,
    *,
    pinned: frozenset[str] = frozenset(),
    workload_max_len: int | None = None,
    estimate: Estimate = memory.estimate,
    limits: Limits = Limits(),
) -> Repair:
    """Mends ``args`` (EngineArgs names; absent or None means vLLM's default), or refuses them.

    Arguments in ``pinned`` are never changed, and max_model_len is never lowered below ``workload_max_len`` tokens.
    ``estimate`` is the memory arithmetic, corrected by earlier starts where there are any (``learned``). Without a
    shape or a machine, the rules that need them are left out. Deterministic and idempotent.
    """
    given = {name: value for name, value in args.items() if value is not None}  # pyright: ignore[reportUnnecessaryComparison]
    if wrong := _wrong_type(given):
        return Repair(Status.REFUSED, args, (), wrong, None)
    case = _Case(given, shape, machine, workload_max_len or 0, estimate, limits)
    reasons: dict[str, list[str]] = {}
    for _ in range(_ROUNDS):
        broken = next(_broken(case), None)
        if broken is None:
            return _outcome(args, given, case, reasons)
        way = next((way for way in broken.ways if way[0] not in pinned), None)
        if way is None:
            held = sorted({name for name, _ in broken.ways})
            refusal = f"{broken.reason}; pinned: {', '.join(held)}" if held else broken.reason
            # There is no arithmetic to do with values out of range.
            return Repair(Status.REFUSED, args, (), refusal, None if _ranges(case) else case.budget)
        reasons.setdefault(way[0], []).append(broken.reason)
        case = replace(case, args=_with(case.args, *way))
    return Repair(Status.REFUSED, args, (), "the repair rules contradict each other here", case.budget)


def _wrong_type(args: Config) -> str:
    for name, value in args.items():
        wanted = _TYPES.get(name, object)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted not in (bool, object)):
            return f"{name} has the wrong type: {value!r}"
    return ""


def _with(args: Config, name: str, value: Value | None) -> dict[str, Value]:
    rest = {key: old for key, old in args.items() if key != name}
    return rest if value is None else {**rest, name: value}


def _outcome(args: Config, given: Config, case: _Case, reasons: Mapping[str, list[str]]) -> Repair:
    changes = tuple(
        Change(name, given.get(name), case.args.get(name), "; ".join(dict.fromkeys(why)))
        for name, why in reasons.items()
        if given.get(name) != case.args.get(name)
    )
    status = Status.REPAIRED if changes else Status.UNCHANGED
    return Repair(status, case.args if changes else args, changes, "", case.budget)


def _broken(case: _Case) -> Iterator[_Broken]:
    return (found for rule in _RULES if (found := rule(case)) is not None)


def _ranges(case: _Case) -> _Broken | None:
    """The bounds that vLLM puts on single values; what lies outside says nothing, so its default stands in."""
    for name, lowest in _LOWEST.items():
        value = case.number(name)
        if value is not None and value < lowest:
            default = lowest if name in _NEVER_NONE else None
            return _Broken(f"{name} must be at least {lowest}, got {value}", ((name, default),))
    if case.number("max_model_len") == 0:
        return _Broken("max_model_len must be above 0, or -1 for what fits", (("max_model_len", None),))
    share = case.args.get("gpu_memory_utilization")
    if share is not None and not 0 < float(share) <= 1:
        wanted = 1.0 if float(share) > 1 else memory.DEFAULT_UTILIZATION
        return _Broken(f"gpu_memory_utilization must lie in (0, 1], got {share}", (("gpu_memory_utilization", wanted),))
    return None


def _heads(case: _Case) -> _Broken | None:
    ranks = case.number("tensor_parallel_size") or 1
    if case.shape is None or case.shape.heads % ranks == 0:
        return None
    return _Broken(f"{case.shape.heads} attention heads cannot be divided over tensor_parallel_size {ranks}")


def _derived_length(case: _Case) -> _Broken | None:
    """config/model.py, _get_and_verify_max_len; VLLM_ALLOW_LONG_MAX_MODEL_LEN lifts it: pass a shape without length."""
    longest, stated = case.shape.max_model_len if case.shape else None, case.number("max_model_len")
    if longest is None or stated is None or stated <= longest:
        return None
    return _shorter(case, longest, f"max_model_len {stated} is above the model's longest, {longest}")


def _shorter(case: _Case, length: int, reason: str) -> _Broken:
    if length < case.workload_max_len:
        return _Broken(f"{reason}; the workload needs {case.workload_max_len}")
    return _Broken(reason, (("max_model_len", length),))


def _blocks(case: _Case) -> _Broken | None:
    """CPU attention's kernels want multiples of 32 (tried: 16 fails), all CUDA backends multiples of 16 (tried: 7).

    The reference MLA of the CPU overrides the size instead.
    """
    size, machine = case.number("block_size"), case.machine
    if size is None or machine is None or (machine.kind == "cpu" and case.shape is not None and case.shape.mla):
        return None
    unit = 32 if machine.kind == "cpu" else 16
    if size % unit == 0:
        return None
    wanted = math.ceil(size / unit) * unit
    return _Broken(f"block_size {size} is no multiple of {unit} on {machine.kind}", (("block_size", wanted),))


def _batch_holds_sequences(case: _Case) -> _Broken | None:
    """config/scheduler.py, verify_max_model_len. An absent max_num_seqs is lowered by vLLM itself."""
    seqs, stated = case.number("max_num_seqs"), case.number("max_num_batched_tokens")
    if seqs is None or (stated is None and case.machine is None):
        return None
    batch = memory.batched_tokens(case.args, case.machine)
    if stated is None and case.args.get("enable_chunked_prefill") is False:
        # vLLM raises its default to the length then; where that is unknown, so is the batch.
        batch = max(batch, case.length or seqs)
    if batch >= seqs:
        return None
    ways = (("max_num_batched_tokens", seqs), ("max_num_seqs", batch))
    return _Broken(f"max_num_batched_tokens {batch} is below max_num_seqs {seqs}", ways)


def _batch_holds_prompt(case: _Case) -> _Broken | None:
    """The same place: a prompt that is not split must fit one step. An absent batch is raised by vLLM itself."""
    batch, length = case.number("max_num_batched_tokens"), case.length
    if case.args.get("enable_chunked_prefill") is not False or batch is None or length is None or batch >= length:
        return None
    reason = f"max_num_batched_tokens {batch} is below max_model_len {length} without chunked prefill"
    shorter = (("max_model_len", batch),) if batch >= max(1, case.workload_max_len) else ()
    return _Broken(reason, (("max_num_batched_tokens", length), ("enable_chunked_prefill", True), *shorter))


def _long_prefill(case: _Case) -> _Broken | None:
    """The same place. Chunks longer than any request change nothing, so the longest request is as good a limit."""
    threshold, length = case.number("long_prefill_token_threshold"), case.length
    if threshold is None or length is None or threshold <= length:
        return None
    reason = f"long_prefill_token_threshold {threshold} is above max_model_len {length}"
    return _Broken(reason, (("long_prefill_token_threshold", length),))


def _share_is_free(case: _Case) -> _Broken | None:
    """worker/utils.py, request_memory; on the CPU kv_cache_memory_bytes lifts it (cpu_worker.py)."""
    machine = case.machine
    if machine is None or (machine.kind == "cpu" and "kv_cache_memory_bytes" in case.args):
        return None
    requested = memory.requested_bytes(case.args, machine)
    if requested <= machine.free_bytes:
        return None
    reason = f"requested {requested / GIB:.2f} GiB exceed the {machine.free_bytes / GIB:.2f} GiB that are free"
    share = math.floor((machine.free_bytes - _margin(machine)) / machine.total_bytes * 1000) / 1000
    return _Broken(reason, (("gpu_memory_utilization", share),) if share > 0 else ())


def _margin(machine: Machine) -> int:
    return max(int(machine.total_bytes * _MARGIN_SHARE), _MARGIN_BYTES)


def _stated_kv_is_free(case: _Case) -> _Broken | None:
    machine, kv = case.machine, case.number("kv_cache_memory_bytes")
    if machine is None or kv is None:
        return None
    fixed = case.budget.fixed_bytes if case.budget else 0
    if kv + fixed * (1 - _SLACK) <= machine.free_bytes:
        return None
    reason = (
        f"kv_cache_memory_bytes {kv / GIB:.2f} GiB + weights and activations {fixed / GIB:.2f} GiB"
        f" exceed the {machine.free_bytes / GIB:.2f} GiB that are free"
    )
    left = machine.free_bytes - fixed - _margin(machine)
    return _Broken(reason, (("kv_cache_memory_bytes", left),) if left > 0 else ())


def _some_kv_is_left(case: _Case) -> _Broken | None:
    budget, machine = case.budget, case.machine
    if budget is None or machine is None or budget.kv_bytes + _SLACK * budget.fixed_bytes > 0:
        return None
    share = case.args.get("gpu_memory_utilization", memory.DEFAULT_UTILIZATION)
    needed = math.ceil(budget.fixed_bytes / machine.total_bytes * 100) / 100
    return _Broken(
        f"weights {budget.weights_bytes / GIB:.2f} GiB + activations {budget.activation_bytes / GIB:.2f} GiB"
        f" + overhead {budget.overhead_bytes / GIB:.2f} GiB exceed {share} x {machine.total_bytes / GIB:.1f} GiB;"
        f" needs utilization ≥ {needed:.2f}"
    )


def _one_request_fits(case: _Case) -> _Broken | None:
    """kv_cache_utils.py, _check_enough_kv_cache_memory. Left to vLLM where layers differ: the estimate is a bound."""
    budget, shape, machine = case.budget, case.shape, case.machine
    if budget is None or shape is None or machine is None or shape.hybrid:
        return None
    need = memory.request_tokens(shape, case.args, machine)
    # A stated cache is exact.
    error = 0 if "kv_cache_memory_bytes" in case.args else _SLACK * budget.fixed_bytes
    if need is None or need * budget.kv_bytes_per_token <= budget.kv_bytes + error:
        return None
    # The blocks that request_tokens counts beside the request's own.
    spare = memory.block_size(shape, case.args, machine) * (2 if shape.sliding_window else 1)
    fits = budget.kv_tokens - spare
    reason = (
        f"one request of max_model_len {case.length} takes {need * budget.kv_bytes_per_token / GIB:.2f} GiB of KV,"
        f" {max(0, budget.kv_bytes) / GIB:.2f} GiB ({budget.kv_tokens} tokens) are there"
    )
    return _shorter(case, fits, reason) if fits > 0 else _Broken(reason)


_RULES: tuple[Callable[[_Case], _Broken | None], ...] = (
    _ranges,
    _heads,
    _derived_length,
    _blocks,
    _batch_holds_sequences,
    _batch_holds_prompt,
    _long_prefill,
    _share_is_free,
    _stated_kv_is_free,
    _some_kv_is_left,
    _one_request_fits,
)
