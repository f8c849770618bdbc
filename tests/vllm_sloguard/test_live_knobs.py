"""Live changes, without vLLM: what is refused, when a change is in force, and what counts as its effect."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sloguard.knobs import KNOBS
from vllm_sloguard.live_knobs import (
    LONG_PREFILL,
    PREFIX_CACHING,
    RESERVE,
    SEQS,
    TOKENS,
    LiveRecord,
    LiveState,
    LiveTargets,
    LiveVerdict,
    Range,
    Step,
    live_refusal,
    live_verdict,
)

RANGES = {SEQS: Range(16, 1, 16), TOKENS: Range(1024, 1, 1024), PREFIX_CACHING: Range(1, 0, 1)}
COLD = {LONG_PREFILL: "the model does not generate"}
BUSY = Step(running=16, waiting=9, admitted=1, tokens=300, piece_tokens=200, lookups=1)


def record() -> LiveRecord:
    return LiveRecord(RANGES, COLD)


def taken(live: LiveRecord, change: LiveTargets, now: float = 0.0) -> None:
    """``change``, received and applied from what the engine was started with."""
    live.receive(change, now)
    held = live.in_force()
    assert held is not None
    live.applied(held, {name: r.started for name, r in RANGES.items()}, now)


def test_the_knob_table_says_what_is_live() -> None:
    live = {name for name, knob in KNOBS.items() if knob.live is not None}

    assert live == {SEQS, TOKENS, LONG_PREFILL, PREFIX_CACHING, RESERVE}
    seqs = KNOBS[SEQS].live
    assert seqs is not None
    assert [seqs.in_version(v) for v in ((0, 25), (0, 26), (0, 32), (0, 33))] == [False, True, True, False]


@pytest.mark.parametrize(
    ("targets", "why"),
    [
        ({}, ""),
        ({SEQS: 16, TOKENS: 16}, ""),
        ({SEQS: 17}, "max_num_seqs: 17 is not from 1 to 16"),
        ({SEQS: 0}, "max_num_seqs: 0 is not from 1 to 16"),
        ({TOKENS: 8}, "max_num_batched_tokens: 8 is below max_num_seqs, 16"),
        ({LONG_PREFILL: 4}, "long_prefill_token_threshold is not live in this engine: the model does not generate"),
        ({"block_size": 16}, "block_size is not live in this engine: no such live knob"),
    ],
)
def test_what_an_engine_can_take(targets: dict[str, int], why: str) -> None:
    assert live_refusal(targets, RANGES, COLD).startswith(why)
    assert bool(live_refusal(targets, RANGES, COLD)) == bool(why)


def test_a_refused_change_leaves_the_one_before_in_force() -> None:
    live = record()
    taken(live, LiveTargets(5, 1, {SEQS: 4}))
    live.receive(LiveTargets(5, 2, {SEQS: 99}), 1.0)

    held, last = live.in_force(), live.last()
    assert held is not None
    assert last is not None
    assert live.targets(held)[SEQS] == 4
    assert last.state is LiveState.REFUSED
    assert "max_num_seqs: 99" in last.refusal


def test_an_earlier_controller_is_refused() -> None:
    live = record()
    taken(live, LiveTargets(5, 1, {SEQS: 4}))
    live.receive(LiveTargets(4, 9, {SEQS: 8}), 1.0)

    last = live.last()
    assert last is not None
    assert last.refusal == "epoch 4 is that of an earlier controller than 5"
    held = live.in_force()
    assert held is not None
    assert live.targets(held)[SEQS] == 4


def test_an_answer_alone_makes_an_earlier_controller_one() -> None:
    live = record()
    live.answered(6, 0.0)
    live.receive(LiveTargets(5, 1, {SEQS: 4}), 1.0)

    assert live.in_force() is None


def test_a_change_that_comes_again_is_nothing_new() -> None:
    live = record()
    change = LiveTargets(5, 1, {SEQS: 4})
    taken(live, change)
    before = live.last(), live.revision
    live.receive(change, 3.0)

    assert (live.last(), live.revision) == before


def test_a_knob_that_a_change_does_not_name_goes_back() -> None:
    live = record()
    taken(live, LiveTargets(5, 1, {SEQS: 4, TOKENS: 64}))
    live.receive(LiveTargets(5, 2, {TOKENS: 64}), 1.0)

    held = live.in_force()
    assert held is not None
    assert live.targets(held) == {SEQS: 16, TOKENS: 64, PREFIX_CACHING: 1}


def test_the_lease_is_renewed_by_the_change_s_own_controller_alone() -> None:
    live = record()
    taken(live, LiveTargets(5, 1, {SEQS: 4}, lease_s=10))
    live.answered(5, 8.0)
    live.lapsed(17.0)
    held = live.in_force()
    assert held is not None
    assert held.state is LiveState.APPLIED
    live.answered(6, 17.5)  # a new sidecar knows nothing of this change
    live.lapsed(18.5)

    held = live.in_force()
    assert held is not None
    assert held.state is LiveState.EXPIRED
    assert live.targets(held)[SEQS] == 16
    assert not live.pending()


def test_a_change_is_pending_until_it_is_applied_settled_and_seen() -> None:
    live = record()
    live.receive(LiveTargets(5, 1, {SEQS: 4}, settle=True), 1.0)
    assert live.pending()
    taken(live, LiveTargets(5, 2, {SEQS: 4}, settle=True), 1.0)
    assert live.pending()
    live.settled(1.5)
    assert live.pending()
    live.on_step(BUSY._replace(running=9), 2.0)
    assert live.pending()
    live.on_step(BUSY._replace(running=4), 3.0)
    assert not live.pending()

    held = live.in_force()
    assert held is not None
    assert held.settled_s == 0.5
    assert set(held.effects) == {SEQS}
    assert (held.effects[SEQS].verdict, held.effects[SEQS].seconds) == (LiveVerdict.SHOWN, 2.0)
    assert held.effects[SEQS].seen == "4 ran, 9 waited"
    assert (held.counters.steps, held.counters.most_running, held.counters.most_tokens) == (2, 9, 300)


def test_a_later_step_may_show_what_an_earlier_one_obeyed() -> None:
    live = record()
    taken(live, LiveTargets(5, 1, {SEQS: 4}))
    for running, waiting, now in ((3, 0, 1.0), (4, 2, 2.0), (2, 0, 3.0)):
        live.on_step(BUSY._replace(running=running, waiting=waiting), now)
        held = live.in_force()
        assert held is not None
        effect = held.effects[SEQS]
        expected = (LiveVerdict.OBEYED, 1.0) if now == 1.0 else (LiveVerdict.SHOWN, 2.0)
        assert (effect.verdict, effect.seconds) == expected


def test_a_broken_engine_has_nothing_live() -> None:
    live = record()
    taken(live, LiveTargets(5, 1, {SEQS: 4}))
    live.broken("AttributeError: gone")

    last = live.last()
    assert last is not None
    assert (last.state, last.refusal) == (LiveState.REFUSED, "AttributeError: gone")
    assert live.ranges == {}
    assert live.cold[SEQS] == "AttributeError: gone"


LIMIT = [
    # before, target, seen, more to do
    (16, 4, 9, True, LiveVerdict.OPEN),
    (16, 4, 4, True, LiveVerdict.SHOWN),
    (16, 4, 4, False, LiveVerdict.OBEYED),
    (16, 4, 3, True, LiveVerdict.OBEYED),
    (4, 16, 4, True, LiveVerdict.OPEN),
    (4, 16, 4, False, LiveVerdict.OBEYED),
    (4, 16, 3, True, LiveVerdict.OBEYED),
    (4, 16, 5, True, LiveVerdict.SHOWN),
]


@pytest.mark.parametrize(("before", "target", "amount", "more", "expected"), LIMIT)
def test_a_limit_is_seen_in_what_runs(before: int, target: int, amount: int, more: bool, expected: LiveVerdict) -> None:
    waiting = 5 if more else 0
    seqs = Step(running=amount, waiting=waiting, admitted=0, tokens=40)
    tokens = Step(running=3, waiting=waiting, admitted=0, tokens=amount)

    assert live_verdict(SEQS, before, target, seqs) is expected
    assert live_verdict(TOKENS, before, target, tokens) is expected


def test_a_step_without_tokens_shows_nothing() -> None:
    for name in (SEQS, TOKENS, LONG_PREFILL, PREFIX_CACHING, RESERVE):
        assert live_verdict(name, 1, 0, BUSY._replace(tokens=0)) is LiveVerdict.OPEN


@pytest.mark.parametrize(
    ("before", "target", "step", "expected"),
    [
        (0, 64, BUSY._replace(piece_tokens=64), LiveVerdict.SHOWN),
        (0, 64, BUSY._replace(piece_tokens=40), LiveVerdict.OBEYED),
        (0, 64, BUSY._replace(piece_tokens=0), LiveVerdict.OPEN),
        (0, 64, BUSY._replace(piece_tokens=40, running=1, waiting=0), LiveVerdict.OPEN),
        (64, 0, BUSY._replace(piece_tokens=65), LiveVerdict.SHOWN),
        (64, 0, BUSY._replace(piece_tokens=64), LiveVerdict.OPEN),
    ],
)
def test_a_long_prompt_is_seen_in_its_pieces(before: int, target: int, step: Step, expected: LiveVerdict) -> None:
    assert live_verdict(LONG_PREFILL, before, target, step) is expected


@pytest.mark.parametrize(
    ("target", "admitted", "lookups", "expected"),
    [
        (0, 2, 0, LiveVerdict.SHOWN),
        (0, 2, 2, LiveVerdict.OPEN),
        (0, 0, 0, LiveVerdict.OPEN),
        (1, 2, 2, LiveVerdict.SHOWN),
        (1, 2, 0, LiveVerdict.OPEN),
        (1, 2, None, LiveVerdict.OBEYED),
        (1, 0, None, LiveVerdict.OPEN),
    ],
)
def test_prefix_caching_is_seen_in_lookups(
    target: int, admitted: int, lookups: int | None, expected: LiveVerdict
) -> None:
    step = BUSY._replace(admitted=admitted, lookups=lookups)

    assert live_verdict(PREFIX_CACHING, 1 - target, target, step) is expected


def test_the_reserve_is_seen_in_what_the_kv_cache_is_asked_for() -> None:
    seen = [live_verdict(RESERVE, 1, 0, BUSY._replace(reserved=reserved)) for reserved in (None, True, False)]

    assert seen == [LiveVerdict.OPEN, LiveVerdict.OPEN, LiveVerdict.SHOWN]


STEPS = st.builds(
    Step, running=st.integers(0, 40), waiting=st.integers(0, 40), admitted=st.integers(0, 9), tokens=st.integers(0, 999)
)


@given(st.integers(1, 16), st.lists(STEPS, max_size=20))
def test_no_step_above_the_target_is_ever_taken_for_its_effect(target: int, steps: list[Step]) -> None:
    live = record()
    taken(live, LiveTargets(1, 1, {SEQS: target}))
    for number, step in enumerate(steps):
        live.on_step(step, float(number))
    held = live.in_force()
    assert held is not None
    if held.effects.get(SEQS) is not None and held.effects[SEQS].verdict is not LiveVerdict.OPEN:
        assert any(step.running <= target and step.tokens for step in steps)
