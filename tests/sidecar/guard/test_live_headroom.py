"""How far above a trial's own values its engine is started."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from sidecar.guard.live_headroom import ceilings
from vllm_sloguard.guard.memory import Budget
from vllm_sloguard.guard.repair import Repair, RepairStatus
from vllm_sloguard.knobs import KNOBS, Value

SEQS = replace(KNOBS["max_num_seqs"], low=1, high=256)
TOKENS = replace(KNOBS["max_num_batched_tokens"], low=512, high=8192)
CACHING, BLOCK = KNOBS["enable_prefix_caching"], KNOBS["block_size"]
ARGS: Mapping[str, Value] = {"max_num_seqs": 16, "max_num_batched_tokens": 2048, "block_size": 32}


def found(args: Mapping[str, Value], kv_tokens: int | None, status: RepairStatus = RepairStatus.UNCHANGED) -> Repair:
    """The guard's result for a KV cache of that many tokens."""
    budget = None if kv_tokens is None else Budget(0, 0, 0, 0, 0, 1, kv_tokens, 0, 0, True, "", 0, None, None, None)
    return Repair(status, args, (), "", budget)


def test_live_knobs_rise_to_the_top_of_the_space_and_cold_ones_stay() -> None:
    args = {**ARGS, "enable_prefix_caching": False}

    raised = ceilings((SEQS, TOKENS, CACHING, BLOCK), args, lambda asked: found(asked, 1000))

    assert raised == {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "enable_prefix_caching": True}


def test_nothing_is_above_the_highest_values_nor_above_what_is_not_stated() -> None:
    highest = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "enable_prefix_caching": True}

    assert ceilings((SEQS, TOKENS, CACHING), highest, lambda asked: found(asked, 1000)) == {}
    assert ceilings((SEQS, TOKENS, CACHING), {}, lambda asked: found(asked, 1000)) == {}


@pytest.mark.parametrize("most", [8192, 6000, 4000, 2500, 2048])
def test_they_rise_only_as_far_as_the_kv_cache_stays_what_it_is(most: int) -> None:
    raised = ceilings(
        (TOKENS,), ARGS, lambda asked: found(asked, 1000 if int(asked["max_num_batched_tokens"]) <= most else 900)
    )

    assert int(raised.get("max_num_batched_tokens", 0)) <= most
    assert bool(raised) == (most > 2896)  # a quarter of the way, on the logarithmic scale


def test_what_the_guard_would_change_is_not_started() -> None:
    assert ceilings((SEQS,), ARGS, lambda asked: found(asked, 1000, RepairStatus.REPAIRED)) == {}


def test_without_a_budget_the_guards_rules_alone_hold() -> None:
    assert ceilings((SEQS,), ARGS, lambda asked: found(asked, None)) == {"max_num_seqs": 256}
