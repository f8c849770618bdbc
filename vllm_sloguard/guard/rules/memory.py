"""Memory rules: the budget, and limits learned from earlier starts on this host.

Repairs use more memory before they reduce anything that users notice: first a larger share if it is free, then smaller
steps, then a shorter max_model_len.
"""

import math
from collections.abc import Callable, Iterator

from vllm_sloguard.guard import memory
from vllm_sloguard.guard.machine import Machine
from vllm_sloguard.guard.memory import GIB, Budget, gib
from vllm_sloguard.guard.rules.model_and_devices import shorter
from vllm_sloguard.guard.rules.rule import Broken, Case, Rule, Stage, Way
from vllm_sloguard.guard.vllm_defaults import sequences

# Left free when a share is lowered: the engine's processes and CUDA context take some before vLLM checks.
_MARGIN_SHARE, _MARGIN_BYTES = 0.01, int(0.75 * GIB)
# Granularity of proposed shares.
_STEPS = 1000


def _room(case: Case, machine: Machine) -> int:
    """Bytes that may be claimed: free memory less learned reserves."""
    least = case.limits.free_bytes
    free = machine.free_bytes if least is None else min(machine.free_bytes, least)
    return free - case.limits.headroom_bytes


def _room_text(case: Case, machine: Machine) -> str:
    limits, parts = case.limits, [f"{gib(machine.free_bytes)} GiB that are free"]
    if limits.free_bytes is not None and limits.free_bytes < machine.free_bytes:
        parts = [f"{gib(limits.free_bytes)} GiB that were free at an earlier start (learned)"]
    if limits.headroom_bytes:
        parts.append(f"less {gib(limits.headroom_bytes)} GiB kept since an out-of-memory under load (learned)")
    return ", ".join(parts)


def _claimable(case: Case, machine: Machine) -> int:
    """The most that a repair claims, in bytes."""
    return _room(case, machine) - max(int(machine.total_bytes * _MARGIN_SHARE), _MARGIN_BYTES, _outside(case))


def _outside(case: Case) -> int:
    return case.dependable_budget.outside_bytes if case.dependable_budget else 0


def _highest_share(case: Case, machine: Machine) -> float:
    return max(0, min(_STEPS, math.floor(_claimable(case, machine) / machine.total_bytes * _STEPS))) / _STEPS


def _share_is_free(case: Case, taught: bool = False) -> Broken | None:
    """worker/utils.py, request_memory; on the CPU kv_cache_memory_bytes lifts it (cpu_worker.py)."""
    machine = case.machine
    if machine is None or (machine.kind == "cpu" and "kv_cache_memory_bytes" in case.args):
        return None
    requested, outside = memory.requested_bytes(case.values, machine), _outside(case)
    if requested + outside <= (_room(case, machine) if taught else machine.free_bytes):
        return None
    beside = f" and {gib(outside)} GiB beside them" if outside else ""
    reason = f"requested {gib(requested)} GiB{beside} exceed the {_room_text(case, machine)}"
    share = _highest_share(case, machine)
    return Broken(reason, (("gpu_memory_utilization", share),) if share > 0 else ())


def _share_is_free_as_learned(case: Case) -> Broken | None:
    return _share_is_free(case, taught=True)


def _stated_kv_is_free(case: Case, taught: bool = False) -> Broken | None:
    machine, kv = case.machine, case.number("kv_cache_memory_bytes")
    if machine is None or kv is None:
        return None
    budget = case.dependable_budget
    fixed, margin = (budget.fixed_bytes, budget.margin_bytes) if budget else (0, 0)
    free = _room(case, machine) if taught else machine.free_bytes
    # Within the error of the estimate, vLLM decides.
    if kv + fixed + _outside(case) - margin <= free:
        return None
    reason = (
        f"kv_cache_memory_bytes {gib(kv)} GiB + weights and activations {gib(fixed)} GiB"
        f" exceed the {_room_text(case, machine)}"
    )
    left = _most_stated_kv(case, machine)
    ways = (
        *((("kv_cache_memory_bytes", left),) if left > 0 else ()),
        *_smaller_steps(case, lambda other: _can_serve_at_most(other, machine)),
    )
    proven = kv > free or (budget is not None and budget.proves_weights)
    return Broken(reason, ways) if proven else _off_the_edge(True, case, Broken(reason, ways))


def _stated_kv_is_free_as_learned(case: Case) -> Broken | None:
    return _stated_kv_is_free(case, taught=True)


def _some_kv_is_left(case: Case) -> Broken | None:
    budget, machine = case.dependable_budget, case.machine
    if budget is None or machine is None or "kv_cache_memory_bytes" in case.args or budget.kv_bytes > 0:
        return None
    share = case.values.get("gpu_memory_utilization", memory.DEFAULT_UTILIZATION)
    needed = math.ceil(budget.fixed_bytes / machine.total_bytes * 1000) / 1000
    reason = (
        f"weights {gib(budget.weights_bytes)} GiB + activations {gib(budget.activation_bytes)} GiB"
        f"{f' + CUDA graphs {gib(budget.graph_bytes)} GiB' if budget.graph_bytes else ''}"
        f" + overhead {gib(budget.overhead_bytes)} GiB exceed"
        f" {share} \N{MULTIPLICATION SIGN} {gib(machine.total_bytes)} GiB;"
        f" needs utilization ≥ {needed:.3f}"
    )
    ways = (*_larger_share(case, machine, _surely_starts), *_smaller_steps(case, can_serve))
    return _off_the_edge(_has_kv(case) or not budget.proves_weights, case, Broken(reason, ways))


def _off_the_edge(possible: bool, case: Case, broken: Broken) -> Broken | None:
    """If a start is merely ``possible``, repairs only with a single change that makes it certain.

    It is possible within the error of the estimate, and wherever the estimate proves nothing. If no single change is
    enough, vLLM decides.
    """
    if not possible:
        return broken
    ways = tuple(way for way in broken.ways if way[0] not in case.pinned and _surely_starts(case.but(*way)))
    return Broken(f"{broken.reason} (within the estimate's error)", ways) if ways else None


def _has_kv(case: Case) -> bool:
    budget = case.dependable_budget
    # A stated KV cache does not depend on the share; another rule checks that it is free.
    return budget is None or "kv_cache_memory_bytes" in case.args or budget.kv_bytes + budget.margin_bytes > 0


def can_serve(case: Case) -> bool:
    """Whether there is a KV cache, and it holds a request of some length sufficient for the workload."""
    if not _has_kv(case):
        return False
    least = max(1, case.workload_max_len)
    shorter = case if "max_model_len" in case.pinned else case.but("max_model_len", least)
    return _request_fits(shorter) or any(_request_fits(shorter.but(*way)) for way in _default_block(case))


def _can_serve_at_most(case: Case, machine: Machine) -> bool:
    """The case with the largest stated KV cache that memory allows, or the pinned one if it fits."""
    most, pinned = _most_stated_kv(case, machine), "kv_cache_memory_bytes" in case.pinned
    if pinned and most >= (case.number("kv_cache_memory_bytes") or 0):
        return can_serve(case)
    return not pinned and most > 0 and can_serve(case.but("kv_cache_memory_bytes", most))


def _most_stated_kv(case: Case, machine: Machine) -> int:
    return _claimable(case, machine) - (case.dependable_budget.fixed_bytes if case.dependable_budget else 0)


def _one_request_fits(case: Case) -> Broken | None:
    """kv_cache_utils.py, _check_enough_kv_cache_memory. Left to vLLM if the estimate does not cover the layers."""
    budget, machine = _budget_of_cache(case), case.machine
    if budget is None or machine is None or _fits_with(case, -1):
        return None
    need = budget.request_bytes
    reason = (
        f"one request of max_model_len {case.length} takes {gib(need)} GiB of KV,"
        f" only {gib(max(0, budget.kv_bytes))} GiB ({budget.kv_tokens:,} tokens) are available"
    )
    longest = _longest(case)
    if longest < max(1, case.workload_max_len):
        reason = shorter(case, longest, reason).reason
    ways = (
        *_smaller_blocks(case),
        *_larger_share(case, machine, _surely_starts),
        *_larger_stated_kv(case, machine, _request_fits),
        *_smaller_steps(case, _request_fits),
        *shorter(case, longest, reason).ways,
        *_for_a_shorter_length(case, machine),
    )
    return _off_the_edge(_request_fits(case) or not budget.proves_cache, case, Broken(reason, ways))


def _budget_of_cache(case: Case) -> Budget | None:
    """The budget, if a configuration may be changed for what it says of the KV cache."""
    budget = case.dependable_budget
    if budget is None or not budget.exact_layout or memory.max_model_len(case.shape, case.values) is None:
        return None
    return budget


def _request_fits(case: Case) -> bool:
    """Whether the KV cache of the longest request fits, within the error of the estimate."""
    return _fits_with(case, 1)


def _fits_with(case: Case, margins: int) -> bool:
    """The same with ``margins`` error bands of tolerance (negative: of reserve); a stated KV cache is exact."""
    budget = _budget_of_cache(case)
    if budget is None:
        return True
    error = 0 if "kv_cache_memory_bytes" in case.args else margins * budget.margin_bytes
    return budget.request_bytes <= budget.kv_bytes + error


def _surely_starts(case: Case) -> bool:
    """Whether it starts even if the estimate is off by its margin, which is what repairs aim at."""
    budget = case.dependable_budget
    return budget is not None and budget.starts and _fits_with(case, -1)


def _longest(case: Case) -> int:
    """The longest max_model_len (tokens) that fits; within the error of the estimate only if nothing fits otherwise."""
    length = case.length or 0
    for fits in (_surely_starts, _request_fits):
        longest = _largest(0, length, lambda tokens, fits=fits: tokens == 0 or fits(case.but("max_model_len", tokens)))
        if longest:
            return longest
    return 0


def _smaller_blocks(case: Case) -> Iterator[Way]:
    """vLLM's default block size, if only rounding up to the stated one makes the request too large."""
    yield from (way for way in _default_block(case) if _request_fits(case.but(*way)))


def _default_block(case: Case) -> Iterator[Way]:
    if "block_size" in case.args and "block_size" not in case.pinned:
        yield "block_size", None


def _larger_share(case: Case, machine: Machine, starts: Callable[[Case], bool]) -> Iterator[Way]:
    """The smallest sufficient share; else the highest one, if other arguments can supply the rest."""
    if "kv_cache_memory_bytes" in case.args:
        return
    low, high = _share(case), _highest_share(case, machine)
    if high <= low:
        return

    def enough(step: int) -> bool:
        return step >= round(high * _STEPS) or starts(case.but("gpu_memory_utilization", step / _STEPS))

    first = math.floor(low * _STEPS) + 1
    yield "gpu_memory_utilization", _smallest(first, round(high * _STEPS), enough) / _STEPS


def _share(case: Case) -> float:
    return float(case.values.get("gpu_memory_utilization", memory.DEFAULT_UTILIZATION))


def _larger_stated_kv(case: Case, machine: Machine, enough: Callable[[Case], bool]) -> Iterator[Way]:
    kv = case.number("kv_cache_memory_bytes")
    if kv is None or enough(case):
        return

    def holds(value: int) -> bool:
        return enough(case.but("kv_cache_memory_bytes", value))

    most = _most_stated_kv(case, machine)
    if most > kv and holds(most):
        yield "kv_cache_memory_bytes", _smallest(kv + 1, most, holds)


def _for_a_shorter_length(case: Case, machine: Machine) -> Iterator[Way]:
    """If no single argument is enough: what makes a shorter length, sufficient for the workload, fit afterwards."""
    yield from (way for way in _default_block(case) if can_serve(case.but(*way)))
    yield from _larger_stated_kv(case, machine, can_serve)
    if "kv_cache_memory_bytes" in case.args:
        yield from _smaller_steps(case, lambda other: _can_serve_at_most(other, machine))


def _smaller_steps(case: Case, fits: Callable[[Case], bool]) -> Iterator[Way]:
    """The largest sufficient batch, or else the most sequences: the profile run computes logits for each."""
    if case.machine is None:
        return
    yield from _smaller_batch(case, case.machine, fits)
    seqs = sequences(case.values, case.machine)
    if seqs > 1 and fits(case.but("max_num_seqs", 1)):
        yield "max_num_seqs", _largest(1, seqs - 1, lambda count: fits(case.but("max_num_seqs", count)))


def _smaller_batch(case: Case, machine: Machine, fits: Callable[[Case], bool]) -> Iterator[Way]:
    """The largest sufficient batch; if sequences or unsplit prompts rule it out, the change that permits it."""
    batch = memory.batched_tokens(case.values, machine)
    seqs = case.number("max_num_seqs") or 1
    prompt = 1 if case.chunked else case.length or 1
    if not fits(case.but("max_num_batched_tokens", 1)):
        return
    most = _largest(1, batch, lambda tokens: fits(case.but("max_num_batched_tokens", tokens)))
    if most >= max(seqs, prompt):
        if most < batch:
            yield "max_num_batched_tokens", most
        return
    if prompt > most:
        yield "enable_chunked_prefill", True
        yield from shorter(case, most, "").ways
    if seqs > most:
        yield "max_num_seqs", most


def _longest_as_learned(case: Case) -> Broken | None:
    """From the message of a failed start: "the estimated maximum model length is N"."""
    if _short_enough(case):
        return None
    longest, length = case.limits.max_model_len or 0, memory.max_model_len(case.shape, case.values)
    reason = f"max_model_len {length} is above the {longest} that vLLM said would fit here (learned)"
    fixed = shorter(case, longest, reason)
    share = _larger_share(case, case.machine, _short_enough) if case.machine is not None else ()
    wider = tuple(way for way in share if _short_enough(case.but(*way)))
    return Broken(fixed.reason, (*wider, *fixed.ways))


def _short_enough(case: Case) -> bool:
    longest, length = case.limits.max_model_len, memory.max_model_len(case.shape, case.values)
    return longest is None or length is None or length <= longest


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest number from ``low`` to ``high`` that holds. ``low`` does, and so does all below one that holds."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _smallest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The smallest number from ``low`` to ``high`` that holds. ``high`` does, and so does all above one that holds."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


MEMORY_RULES: tuple[Rule, ...] = (
    Rule("share-free", "the requested share of the memory is free", Stage.MEMORY, _share_is_free),
    Rule("share-free-learned", "it leaves the learned reserve free", Stage.LEARNED, _share_is_free_as_learned),
    Rule("stated-kv-free", "a stated KV cache fits into free memory with the model", Stage.MEMORY, _stated_kv_is_free),
    Rule("stated-kv-learned", "it leaves the learned reserve free", Stage.LEARNED, _stated_kv_is_free_as_learned),
    Rule("length-learned", "max_model_len is at most what vLLM said would fit", Stage.LEARNED, _longest_as_learned),
    Rule("some-kv", "weights and activations leave memory for the KV cache", Stage.MEMORY, _some_kv_is_left),
    Rule("one-request", "the KV cache holds one request of max_model_len", Stage.MEMORY, _one_request_fits),
)
