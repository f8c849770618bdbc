"""Live changes in real vLLM, on one engine: what is changed is seen in what it does, and no request notices."""

import random
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from live_changes import LiveEngine, Load, change_at_random, complete, live_engine, report, serve_live

from sidecar.engine.engine import Engine
from sidecar.engine.live_knobs import LEASE_S, LiveError, LiveHub
from vllm_sloguard.live_knobs import LONG_PREFILL, PREFIX_CACHING, RESERVE, SEQS, TOKENS, LiveVerdict

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

DRAW = random.Random(7)
PROMPTS = ["".join(DRAW.choices("abcdefgh ", k=400)) for _ in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engine's sidecar listens, as ``s``."""
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def live(folder: Path) -> Generator[LiveEngine]:
    """An engine that may run 16 requests and 1024 tokens a step."""
    with live_engine(folder) as parts:
        yield parts


def until(holds: Callable[[], bool]) -> None:
    """Waits until ``holds``; fails when that takes a minute."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "not within a minute"
        time.sleep(0.1)


def ask(engine: Engine) -> None:
    """Sends every prompt once, one after another."""
    model = engine.http.model()
    assert [complete(engine, model, prompt, 4) for prompt in PROMPTS] == [""] * len(PROMPTS)


def hits(hub: LiveHub) -> tuple[int, int]:
    """Prompt tokens looked up and found in the prefix cache since the last change, once all of it is told."""
    hub.verified("live", 60)
    last: tuple[int, int] | None = None
    while True:
        time.sleep(2.5)  # more than twice as long as counts stay untold
        effects = hub.effects("live")
        assert effects.prefix_queries is not None
        assert effects.prefix_hits is not None
        told = effects.prefix_queries, effects.prefix_hits
        if told == last:
            return told
        last = told


def test_the_engine_says_what_can_change(live: LiveEngine) -> None:
    able = live.hub.capabilities("live", 60)

    assert able.cold == {}
    assert {name: (r.started, r.lowest, r.highest) for name, r in able.ranges.items()} == {
        SEQS: (16, 1, 16),
        TOKENS: (1024, 1, 1024),
        LONG_PREFILL: (0, 0, 1024),
        PREFIX_CACHING: (1, 0, 1),
        RESERVE: (1, 0, 1),
    }


def test_above_the_ceiling_is_refused_and_nothing_changes(live: LiveEngine) -> None:
    engine, hub = live.engine, live.hub
    for targets in ({SEQS: 17}, {TOKENS: 1025}, {LONG_PREFILL: 1025}, {PREFIX_CACHING: 2}, {"block_size": 64}):
        with pytest.raises(LiveError):
            hub.change("live", targets, 60)
    ask(engine)
    assert hub.capabilities("live", 60).current[SEQS] == 16


def test_after_settling_nothing_of_the_load_before_is_found(live: LiveEngine) -> None:
    engine, hub = live.engine, live.hub
    ask(engine)
    hub.change("live", {}, 60)
    ask(engine)
    queries, found = hits(hub)
    assert queries > 0
    assert found > queries / 2

    hub.settle("live", 60)
    ask(engine)
    effects = hub.verified("live", 60)
    assert effects.settled_s is not None
    queries, found = hits(hub)
    assert queries > 0
    assert found == 0


def test_prefix_caching_off_finds_nothing_and_on_finds_it_again(live: LiveEngine) -> None:
    engine, hub = live.engine, live.hub
    ask(engine)
    hub.change("live", {PREFIX_CACHING: 0}, 60)
    ask(engine)
    assert hub.verified("live", 60).knobs[PREFIX_CACHING].verdict is LiveVerdict.SHOWN
    assert hits(hub) == (0, 0)

    hub.change("live", {}, 60)
    ask(engine)
    assert hub.verified("live", 60).knobs[PREFIX_CACHING].verdict is LiveVerdict.SHOWN
    assert hits(hub)[1] > 0


def test_sixteen_two_and_sixteen_again_under_load(live: LiveEngine) -> None:
    engine, hub = live.engine, live.hub
    with Load(engine) as load:
        time.sleep(2)
        for seqs in (2, 16, 2, 16):
            hub.change("live", {SEQS: seqs}, 60)
            effects = hub.verified("live", 60)
            assert effects.knobs[SEQS].verdict in (LiveVerdict.OBEYED, LiveVerdict.SHOWN)
            assert effects.knobs[SEQS].target == seqs
            # What ran before the limit was lowered counts in its first steps; from then on it holds.
            hub.change("live", {SEQS: seqs}, 60)
            time.sleep(2.5)
            assert hub.effects("live").most_running <= seqs
            if seqs == 16:
                until(lambda: hub.effects("live").most_running > 2)
        until(lambda: load.finished > 20)
    assert load.failures == []


def test_twenty_random_changes_under_load(live: LiveEngine) -> None:
    # On a busy machine steps take long; make bench-live holds the time against what is promised.
    outcome = change_at_random(live, changes=20, seed=3, within_s=60)

    print(report(outcome))
    assert outcome.failed_requests == 0
    assert outcome.problems == []
    assert outcome.verified_in_time == 20
    assert outcome.shown.total() > 10


def test_without_its_sidecar_the_engine_goes_back_after_the_lease(live: LiveEngine, folder: Path) -> None:
    """The last one on this engine: it takes the sidecar."""
    engine, hub = live.engine, live.hub
    hub.change("live", {SEQS: 2, PREFIX_CACHING: 0}, 60)
    with Load(engine) as load:
        assert hub.verified("live", 60).verified()
        hub.close()
        live.server.stop(0).wait()
        time.sleep(LEASE_S + 3)
    assert load.failures == []

    later = LiveHub(epoch=2)
    server = serve_live(later, folder / "s")
    try:
        able = later.capabilities("live", 60)
        assert (able.current[SEQS], able.current[PREFIX_CACHING]) == (16, 1)
        with Load(engine) as load:
            later.change("live", {SEQS: 3}, 60)
            assert later.verified("live", 60).verified()
        assert load.failures == []
    finally:
        later.close()
        server.stop(0).wait()
