"""Live knobs at a scheduler: between steps, never below what runs, and gone for good when something is wrong."""

import random
from collections.abc import Callable

import pytest
from fake_scheduler import FakeScheduler, Output, Request
from hypothesis import given
from hypothesis import strategies as st

from vllm_sloguard.hooks.live_scheduler import LiveScheduler
from vllm_sloguard.live_knobs import (
    LONG_PREFILL,
    PREFIX_CACHING,
    RESERVE,
    SEQS,
    TOKENS,
    LiveProgress,
    LiveState,
    LiveTargets,
    LiveVerdict,
)

NOW = (0, 32)


class Engine:
    """A scheduler with live knobs, which gets steps and changes."""

    def __init__(self, scheduler: FakeScheduler | None = None) -> None:
        self.scheduler = scheduler or FakeScheduler()
        self.encoder_resets = 0
        self.live = LiveScheduler(self.scheduler, NOW, self._reset_encoder)
        self._changes = 0

    def _reset_encoder(self) -> None:
        self.encoder_resets += 1

    def change(self, settle: bool = False, **targets: int) -> None:
        self._changes += 1
        self.live.receive(LiveTargets(1, self._changes, targets, settle), 0.0)

    def submit(self, count: int, prompt: int = 64, output: int = 4) -> None:
        self.scheduler.waiting.extend(Request(prompt, output) for _ in range(count))

    def step(self) -> Output:
        return self.scheduler.schedule()

    def progress(self) -> LiveProgress:
        held = self.live.record.in_force()
        assert held is not None
        return held

    def shown(self) -> dict[str, LiveVerdict]:
        return {name: effect.verdict for name, effect in self.progress().effects.items()}


@pytest.fixture(params=[True, False], ids=["0.32", "0.26"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """As each version of vLLM limits what runs."""
    return Engine(FakeScheduler(separate_limit=request.param))


def test_what_the_engine_was_started_with_is_the_ceiling(engine: Engine) -> None:
    assert {name: (r.started, r.lowest, r.highest) for name, r in engine.live.record.ranges.items()} == {
        SEQS: (16, 1, 16),
        TOKENS: (1024, 1, 1024),
        LONG_PREFILL: (0, 0, 1024),
        PREFIX_CACHING: (1, 0, 1),
        RESERVE: (1, 0, 1),
    }
    assert engine.live.record.cold == {}
    assert engine.live.current() == {SEQS: 16, TOKENS: 1024, LONG_PREFILL: 0, PREFIX_CACHING: 1, RESERVE: 1}


def test_fewer_requests_are_approached_as_they_finish(engine: Engine) -> None:
    engine.submit(40)
    engine.step()
    assert len(engine.scheduler.running) == 16
    engine.change(max_num_seqs=3)
    engine.submit(40, output=9)
    limits: list[int] = []
    for _ in range(6):
        engine.step()
        limits.append(engine.live.current()[SEQS])

    assert limits[0] == 16
    assert limits[-1] == 3
    assert len(engine.scheduler.running) == 3
    assert engine.shown() == {SEQS: LiveVerdict.SHOWN}
    effect = engine.progress().effects[SEQS]
    assert (effect.before, effect.target) == (16, 3)

    engine.change()  # all back
    engine.step()
    assert len(engine.scheduler.running) == 16
    assert engine.shown() == {SEQS: LiveVerdict.SHOWN}


def test_fewer_tokens_still_give_one_to_each_that_runs(engine: Engine) -> None:
    engine.submit(16, prompt=8, output=50)
    engine.step()
    engine.change(max_num_seqs=4, max_num_batched_tokens=4)
    output = engine.step()

    assert engine.live.current()[TOKENS] == 16
    assert output.total_num_scheduled_tokens == 16
    for _ in range(60):
        engine.step()
    assert engine.live.current()[TOKENS] == 4


def test_pieces_of_prompts_prefix_caching_and_the_reserve_change(engine: Engine) -> None:
    engine.submit(3, prompt=300)
    engine.step()
    original = engine.scheduler.kv_cache_manager.allocate_slots
    engine.change(long_prefill_token_threshold=50, enable_prefix_caching=0, scheduler_reserve_full_isl=0)
    engine.submit(2, prompt=300)
    engine.step()

    assert engine.shown() == {
        LONG_PREFILL: LiveVerdict.SHOWN,
        PREFIX_CACHING: LiveVerdict.SHOWN,
        RESERVE: LiveVerdict.SHOWN,
    }
    manager = engine.scheduler.kv_cache_manager
    assert not manager.enable_caching
    assert not manager.coordinator.single_type_managers[0].enable_caching
    assert manager.asked == [True] * 3 + [False] * 2
    assert manager.allocate_slots == original  # nothing is left between vLLM and its KV cache


def test_settling_waits_until_nothing_runs(engine: Engine) -> None:
    engine.submit(2, output=2)
    engine.step()
    engine.change(settle=True)
    engine.step()
    assert engine.scheduler.resets == 0
    assert engine.live.record.pending()
    while engine.scheduler.running:
        engine.step()
    engine.submit(1)
    engine.step()

    assert engine.scheduler.resets == 1
    assert engine.encoder_resets == 1
    assert engine.progress().settled_s is not None
    for _ in range(9):
        engine.step()
    assert engine.scheduler.resets == 1


def test_an_expired_change_is_undone_before_the_next_step(engine: Engine) -> None:
    engine.submit(40, output=90)
    engine.change(max_num_seqs=2, enable_prefix_caching=0)
    engine.step()
    assert len(engine.scheduler.running) == 2
    engine.live.lapsed(1e9)
    engine.step()

    assert engine.progress().state is LiveState.EXPIRED
    assert engine.live.current() == {SEQS: 16, TOKENS: 1024, LONG_PREFILL: 0, PREFIX_CACHING: 1, RESERVE: 1}
    assert len(engine.scheduler.running) == 16


def test_the_scheduler_is_hooked_only_while_a_change_is_in_force(engine: Engine) -> None:
    def hooked() -> bool:
        return "schedule" in vars(engine.scheduler)

    engine.submit(2, output=90)
    engine.step()
    assert not hooked()
    engine.change(max_num_seqs=0)  # refused
    assert not hooked()
    engine.change(max_num_seqs=2)
    assert hooked()
    engine.step()
    engine.live.lapsed(1e9)
    engine.step()
    assert engine.live.current()[SEQS] == 16
    assert not hooked()
    engine.change(max_num_seqs=3)
    engine.step()
    assert engine.live.current()[SEQS] == 3


def test_a_verified_change_stays_in_force_without_the_hook_until_its_lease_is_over(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_sloguard.hooks.live_scheduler._MAX_FOLLOWED", 5)
    engine.submit(40, output=90)
    engine.change(max_num_seqs=2)
    for _ in range(5):
        assert "schedule" in vars(engine.scheduler)
        engine.step()
    assert "schedule" not in vars(engine.scheduler)
    assert engine.shown() == {SEQS: LiveVerdict.SHOWN}
    engine.step()
    assert len(engine.scheduler.running) == 2

    engine.live.lapsed(5.0)
    assert "schedule" not in vars(engine.scheduler)
    engine.live.lapsed(1e9)
    engine.step()
    assert engine.live.current()[SEQS] == 16


def test_an_unverified_change_keeps_the_hook(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_sloguard.hooks.live_scheduler._MAX_FOLLOWED", 2)
    engine.submit(1, output=90)
    engine.step()
    engine.change(enable_prefix_caching=0)  # shown by the next admission
    for _ in range(9):
        engine.step()
    assert "schedule" in vars(engine.scheduler)
    engine.submit(1, output=90)
    engine.step()
    assert engine.shown() == {PREFIX_CACHING: LiveVerdict.SHOWN}
    assert "schedule" not in vars(engine.scheduler)


class Counting(FakeScheduler):
    """Counts its steps."""

    steps = 0

    def schedule(self) -> Output:
        self.steps += 1
        return super().schedule()


def test_a_change_that_comes_while_the_hook_is_taken_out_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Counting()
    engine = Engine(scheduler)
    engine.submit(2, output=90)
    engine.change(max_num_seqs=2)
    engine.step()
    engine.live.lapsed(1e9)
    in_force = engine.live.record.in_force
    # After the step, the hook reads the change to record the step, and again to decide whether to go.
    after_reading: list[Callable[[], None]] = [lambda: engine.change(max_num_seqs=3), lambda: None]

    def in_force_and_then_a_change() -> LiveProgress | None:
        held = in_force()
        if scheduler.steps == 2 and after_reading:
            after_reading.pop()()
        return held

    monkeypatch.setattr(engine.live.record, "in_force", in_force_and_then_a_change)
    engine.step()
    engine.step()

    assert not after_reading
    assert engine.live.current()[SEQS] == 3


def test_what_goes_wrong_puts_everything_back_for_good(engine: Engine) -> None:
    engine.submit(40, output=90)
    engine.change(max_num_seqs=2)
    engine.step()
    manager = engine.scheduler.kv_cache_manager
    stats, manager.prefix_cache_stats = manager.prefix_cache_stats, "something else"
    with pytest.raises(AttributeError):
        engine.step()
    manager.prefix_cache_stats = stats
    for _ in range(2):
        engine.step()  # it stays away

    assert len(engine.scheduler.running) == 16
    assert engine.live.record.ranges == {}
    assert "no attribute" in engine.progress().refusal


def test_what_can_t_change_says_why() -> None:
    scheduler = FakeScheduler()
    scheduler.vllm_config.speculative_config = object()
    del scheduler.scheduler_config.long_prefill_token_threshold
    scheduler.kv_cache_manager.enable_caching = False
    scheduler.vllm_config.attention_config.hisparse_config = object()
    cold = Engine(scheduler).live.record.cold

    assert cold[TOKENS] == "speculative decoding takes a part of each step"
    assert cold[LONG_PREFILL].startswith("this vLLM is another than it should be")
    assert cold[PREFIX_CACHING] == "the engine was started with it off"
    assert cold[RESERVE] == "HiSparse needs it on"
    assert set(LiveScheduler(FakeScheduler(), (0, 40), None).record.cold) == {*cold, SEQS}


def test_without_chunked_prefill_the_longest_prompt_fits_into_a_step() -> None:
    scheduler = FakeScheduler(tokens=2048)
    scheduler.scheduler_config.enable_chunked_prefill = False

    assert Engine(scheduler).live.record.ranges[TOKENS].lowest == 1024


@given(st.integers(0, 2**32), st.booleans())
def test_random_changes_never_break_the_scheduler(seed: int, separate_limit: bool) -> None:
    """The fake asserts what vLLM asserts; every request is served in the end."""
    draw = random.Random(seed)
    engine = Engine(FakeScheduler(separate_limit=separate_limit))
    for _ in range(60):
        if draw.random() < 0.3:
            seqs = draw.randint(1, 16)
            threshold, cached = draw.randint(0, 64), draw.randint(0, 1)
            engine.change(
                settle=draw.random() < 0.5,
                max_num_seqs=seqs,
                max_num_batched_tokens=draw.randint(seqs, 1024),
                long_prefill_token_threshold=threshold,
                enable_prefix_caching=cached,
            )
        engine.submit(draw.choice((0, 0, 1, 5)), draw.randint(1, 200), draw.randint(1, 20))
        engine.step()
        assert engine.live.record.ranges
    for _ in range(100_000):
        if not engine.scheduler.running and not engine.scheduler.waiting:
            break
        engine.step()
    assert not engine.scheduler.waiting
