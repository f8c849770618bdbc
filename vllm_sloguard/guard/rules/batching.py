"""Rules that relate lengths, batches and sequences: config/scheduler.py, verify_max_model_len."""

from vllm_sloguard.guard import memory
from vllm_sloguard.guard.rules.memory import can_serve
from vllm_sloguard.guard.rules.rule import Broken, Case, Rule, Stage


def _batch_holds_sequences(case: Case) -> Broken | None:
    """vLLM lowers its default of max_num_seqs itself (arg_utils.py)."""
    seqs, stated = case.number("max_num_seqs"), case.number("max_num_batched_tokens")
    if seqs is None or (stated is None and case.machine is None):
        return None
    batch = memory.batched_tokens(case.values, case.machine)
    if stated is None and not case.chunked:
        # vLLM then raises its default to the length; if that is unknown, so is the batch.
        batch = max(batch, case.length or seqs)
    if batch >= seqs:
        return None
    ways = [("max_num_batched_tokens", seqs), ("max_num_seqs", batch)]
    if not can_serve(case.but("max_num_batched_tokens", seqs)):
        ways.reverse()
    return Broken(f"max_num_batched_tokens {batch} is below max_num_seqs {seqs}", tuple(ways))


def _batch_holds_prompt(case: Case) -> Broken | None:
    """A prompt that is not split must fit into one step. vLLM raises its default batch itself."""
    batch, length = case.number("max_num_batched_tokens"), case.length
    if case.chunked or batch is None or length is None or batch >= length:
        return None
    reason = f"max_num_batched_tokens {batch} is below max_model_len {length} without chunked prefill"
    shorter = (("max_model_len", batch),) if batch >= max(1, case.workload_max_len) else ()
    return Broken(reason, (("max_num_batched_tokens", length), ("enable_chunked_prefill", True), *shorter))


def _long_prefill(case: Case) -> Broken | None:
    """Above the longest request the threshold has no effect, so lowering it to that changes nothing."""
    threshold, length = case.number("long_prefill_token_threshold"), case.length
    if threshold is None or length is None or threshold <= length:
        return None
    reason = f"long_prefill_token_threshold {threshold} is above max_model_len {length}"
    return Broken(reason, (("long_prefill_token_threshold", length),))


BATCHING_RULES: tuple[Rule, ...] = (
    Rule("batch-sequences", "a step has a token for every sequence", Stage.CONFIG, _batch_holds_sequences),
    Rule("batch-prompt", "without chunked prefill a step holds the longest prompt", Stage.CONFIG, _batch_holds_prompt),
    Rule("long-prefill", "long_prefill_token_threshold is at most max_model_len", Stage.CONFIG, _long_prefill),
)
