"""Live changes of one running engine: each change shows in its behaviour, and no request fails."""

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
    """The folder of the sidecar's socket, ``s``."""
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def live(folder: Path) -> Generator[LiveEngine]:
    """An engine that may run 16 requests and 1024 tokens a step."""
    with live_engine(folder) as parts:
        yield parts


def until(holds: Callable[[], bool]) -> None:
    """Waits up to a minute for ``holds``."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "not within a minute"
        time.sleep(0.1)


def send_prompts(engine: Engine) -> None:
    """Sends every prompt once, one after another."""
    model = engine.http.model()
    assert [complete(engine, model, prompt, 4) for prompt in PROMPTS] == [""] * len(PROMPTS)


def hits(hub: LiveHub) -> tuple[int, int]:
    """Prompt tokens looked up and found in the prefix cache since the last change, once the counts are final."""
    hub.verified("live", 60)
    last: tuple[int, int] | None = None
    while True:
        time.sleep(2.5)  # more than two reporting intervals
        effects = hub.effects("live")
        assert effects.prefix_queries is not None
        assert effects.prefix_hits is not None
        counts = effects.prefix_queries, effects.prefix_hits
        if counts == last:
            return counts
        last = counts


def test_the_engine_reports_its_live_knobs(live: LiveEngine) -> None:
    capabilities = live.hub.capabilities("live", 60)

    assert capabilities.cold == {}
    assert {name: (r.started, r.lowest, r.highest) for name, r in capabilities.ranges.items()} == {
        SEQS: (16, 1, 16),
        TOKENS: (1024, 1, 1024),
        LONG_PREFILL: (0, 0, 1024),
        PREFIX_CACHING: (1, 0, 1),
        RESERVE: (1, 0, 1),
    }


def test_a_value_above_the_ceiling_is_refused(live: LiveEngine) -> None:
    engine, hub = live.engine, live.hub
    for targets in ({SEQS: 17}, {TOKENS: 1025}, {LONG_PREFILL: 1025}, {PREFIX_CACHING: 2}, {"block_size": 64}):
        with pytest.raises(LiveError):
            hub.change("live", targets, 60)
    send_prompts(engine)
    assert hub.capabilities("live", 60).current[SEQS] == 16


def test_settling_empties_the_prefix_cache(live: LiveEngine) -> None:
    engine, hub = live.engine, live.hub
    send_prompts(engine)
    hub.change("live", {}, 60)
    send_prompts(engine)
    queries, found = hits(hub)
    assert queries > 0
    assert found > queries / 2

    hub.settle("live", 60)
    send_prompts(engine)
    effects = hub.verified("live", 60)
    assert effects.settled_s is not None
    queries, found = hits(hub)
    assert queries > 0
    assert found == 0


def test_prefix_caching_off_and_on(live: LiveEngine) -> None:
    engine, hub = live.engine, live.hub
    send_prompts(engine)
    hub.change("live", {PREFIX_CACHING: 0}, 60)
    send_prompts(engine)
    assert hub.verified("live", 60).knobs[PREFIX_CACHING].verdict is LiveVerdict.SHOWN
    assert hits(hub) == (0, 0)

    hub.change("live", {}, 60)
    send_prompts(engine)
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
            # Requests that ran before the limit was lowered count in its first steps; afterwards it holds.
            hub.change("live", {SEQS: seqs}, 60)
            time.sleep(2.5)
            assert hub.effects("live").most_running <= seqs
            if seqs == 16:
                until(lambda: hub.effects("live").most_running > 2)
        until(lambda: load.finished > 20)
    assert load.failures == []


def test_twenty_random_changes_under_load(live: LiveEngine) -> None:
    # Steps take long on a busy machine; make bench-live measures the time.
    outcome = change_at_random(live, changes=20, seed=3, within_s=60)

    print(report(outcome))
    assert outcome.failed_requests == 0
    assert outcome.problems == []
    assert outcome.verified_in_time == 20
    assert outcome.shown.total() > 10


def test_the_engine_reverts_when_the_lease_expires(live: LiveEngine, folder: Path) -> None:
    """Last on this engine: it ends the sidecar."""
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
