"""The plugin's live link and the sidecar's hub over real gRPC, with a miniature of vLLM's scheduler."""

import contextlib
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import grpc
import pytest
from fake_scheduler import FakeScheduler, Request
from sidecar_cases import until

from sidecar.engine.live_knobs import Capabilities, LiveError, LiveHub, live_targets, reachable
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.hooks.live_client import LiveLink
from vllm_sloguard.hooks.live_scheduler import LiveScheduler
from vllm_sloguard.hooks.settings import Settings
from vllm_sloguard.knobs import KnobValues
from vllm_sloguard.live_knobs import LONG_PREFILL, PREFIX_CACHING, RESERVE, SEQS, TOKENS, LiveVerdict, Range
from vllm_sloguard.wire import live_pb2 as pb
from vllm_sloguard.wire.live_pb2_grpc import LiveServiceStub, add_LiveServiceServicer_to_server


@contextlib.contextmanager
def serving(hub: LiveHub, socket: Path) -> Generator[None]:
    server = serve_unix_socket(socket, lambda server: add_LiveServiceServicer_to_server(hub, server))
    try:
        yield
    finally:
        hub.close()
        server.stop(grace=None).wait(5)


class Core:
    """A miniature engine core: a thread that takes steps while there are requests."""

    def __init__(self, socket: Path, index: int = 0, seqs: int = 16) -> None:
        self.scheduler = FakeScheduler(seqs=seqs)
        self.live = LiveScheduler(self.scheduler, (0, 32), None)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        LiveLink(Settings(socket=str(socket), engine_id="one"), self.live, index, "0.32.0").open()

    def _run(self) -> None:
        while not self._over.wait(0.002):
            if self.scheduler.waiting or self.scheduler.running:
                self.scheduler.schedule()

    def submit(self, count: int) -> None:
        self.scheduler.waiting.extend(Request(40, 20) for _ in range(count))

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture
def core(tmp_path: Path) -> Generator[Callable[..., Core]]:
    """Creates engine cores that are stopped after the test."""
    made: list[Core] = []

    def make(index: int = 0, seqs: int = 16) -> Core:
        made.append(Core(tmp_path / "s", index, seqs))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def hub_for(cores: int = 1, epoch: int = 1, lease_s: float = 10.0) -> LiveHub:
    hub = LiveHub(epoch, lease_s)
    hub.expect("one", cores)
    return hub


def test_a_change_is_taken_at_once_and_verified_under_load(tmp_path: Path, core: Callable[..., Core]) -> None:
    hub = hub_for()
    with serving(hub, tmp_path / "s"):
        engine = core()
        able = hub.capabilities("one", 60)
        assert able.ranges[SEQS] == Range(16, 1, 16)
        effects = hub.change("one", {SEQS: 4}, 60)
        assert (effects.applied_s, effects.verified()) == (None, False)  # nothing runs yet
        engine.submit(60)
        effects = hub.verified("one", 60)

        assert effects.verified()
        assert effects.knobs[SEQS].verdict is LiveVerdict.SHOWN
        assert (effects.knobs[SEQS].before, effects.knobs[SEQS].target) == (16, 4)
        assert "ran" in effects.knobs[SEQS].seen
        assert effects.most_running <= 4
        assert effects.steps >= 1
        assert effects.prefix_queries is not None


def test_settling_is_reported_when_it_is_done(tmp_path: Path, core: Callable[..., Core]) -> None:
    hub = hub_for()
    with serving(hub, tmp_path / "s"):
        engine = core()
        hub.change("one", {SEQS: 4}, 60)
        effects = hub.settle("one", 60)
        assert effects.settled_s is None
        engine.submit(1)
        effects = hub.verified("one", 60)

        assert effects.settled_s is not None
        assert engine.scheduler.resets == 1
        assert engine.live.current()[SEQS] == 4


@pytest.mark.parametrize(
    ("targets", "why"),
    [
        ({SEQS: 17}, "max_num_seqs: 17 is not from 1 to 16"),
        ({"block_size": 32}, "block_size is not live in this engine: no such live knob"),
        ({TOKENS: 8}, "max_num_batched_tokens: 8 is below max_num_seqs, 16"),
    ],
)
def test_what_can_t_be_is_said_and_changes_nothing(
    tmp_path: Path, core: Callable[..., Core], targets: dict[str, int], why: str
) -> None:
    hub = hub_for()
    with serving(hub, tmp_path / "s"):
        engine = core()
        with pytest.raises(LiveError, match=why):
            hub.change("one", targets, 60)
        assert engine.live.record.last() is None


def test_an_engine_that_is_not_there_is_said(tmp_path: Path) -> None:
    hub = hub_for()
    with serving(hub, tmp_path / "s"):
        with pytest.raises(LiveError, match=r"one: 0 of 1 cores have asked for live changes in 0\.1 s"):
            hub.change("one", {}, 0.1)
        with pytest.raises(LiveError, match="two: this engine is not running here"):
            hub.change("two", {}, 0.1)
        with pytest.raises(LiveError, match="no live change was made"):
            hub.effects("one")


def test_all_cores_of_an_engine_take_a_change(tmp_path: Path, core: Callable[..., Core]) -> None:
    hub = hub_for(cores=2)
    with serving(hub, tmp_path / "s"):
        cores = [core(0), core(1)]
        hub.change("one", {SEQS: 4}, 60)
        for one in cores:
            one.submit(60)
        effects = hub.verified("one", 60)

        assert effects.verified()
        assert all(one.live.current()[SEQS] == 4 for one in cores)
        assert effects.most_running <= 4


def test_a_core_that_does_not_answer_undoes_the_change_in_the_others(tmp_path: Path, core: Callable[..., Core]) -> None:
    hub = hub_for(cores=2)
    with serving(hub, tmp_path / "s"):
        engine = core(0)
        with grpc.insecure_channel(f"unix:{tmp_path / 's'}") as channel:
            # The other core reports its capabilities, then goes silent.
            knobs = [pb.LiveKnob(name=SEQS, started=16, current=16, lowest=1, highest=16)]
            LiveServiceStub(channel).Await(pb.AwaitRequest(engine_id="one", engine_index=1, knobs=knobs), timeout=60)
        hub.capabilities("one", 60)  # both have asked
        engine.submit(400)
        with pytest.raises(LiveError, match=r"one: a core did not answer in 0\.5 s"):
            hub.change("one", {SEQS: 4}, 0.5)
        until(lambda: engine.live.current()[SEQS] == 16)


def test_what_one_core_can_t_do_no_core_does(tmp_path: Path, core: Callable[..., Core]) -> None:
    hub = hub_for(cores=2)
    with serving(hub, tmp_path / "s"):
        core(0)
        core(1, seqs=8)

        assert hub.capabilities("one", 60).ranges[SEQS].highest == 8
        with pytest.raises(LiveError, match="9 is not from 1 to 8"):
            hub.change("one", {SEQS: 9}, 60)


def test_an_earlier_sidecar_is_refused(tmp_path: Path, core: Callable[..., Core]) -> None:
    late, early = hub_for(epoch=7), hub_for(epoch=6)
    engine = core()
    with serving(late, tmp_path / "s"):
        late.change("one", {SEQS: 4}, 60)
    with serving(early, tmp_path / "s"), pytest.raises(LiveError, match="epoch 6 is that of an earlier controller"):
        early.change("one", {SEQS: 8}, 60)
    engine.submit(60)
    until(lambda: engine.live.current()[SEQS] == 4)


def test_when_the_sidecar_is_gone_the_lease_ends_and_the_engine_is_as_it_was_started(
    tmp_path: Path, core: Callable[..., Core]
) -> None:
    hub = hub_for(lease_s=3.0)
    engine = core()
    with serving(hub, tmp_path / "s"):
        hub.change("one", {SEQS: 4}, 60)
        engine.submit(3000)
        assert hub.verified("one", 60).verified()
        time.sleep(4.0)  # longer than the lease: while it answers, nothing is undone
        assert engine.live.current()[SEQS] == 4
    until(lambda: engine.live.current()[SEQS] == 16)

    again = hub_for(epoch=1)
    with serving(again, tmp_path / "s"):
        assert again.capabilities("one", 60).current[SEQS] == 16


def test_a_stranger_is_not_answered(tmp_path: Path) -> None:
    hub = hub_for()
    with serving(hub, tmp_path / "s"), grpc.insecure_channel(f"unix:{tmp_path / 's'}") as channel:
        stub = LiveServiceStub(channel)
        with pytest.raises(grpc.RpcError) as unknown:
            stub.Await(pb.AwaitRequest(engine_id="two"), timeout=60)
        with pytest.raises(grpc.RpcError) as beyond:
            stub.Await(pb.AwaitRequest(engine_id="one", engine_index=1), timeout=60)

    assert "engine_id: 'two' is not running here" in str(unknown.value)
    assert "engine_index: 1 is not below 1" in str(beyond.value)


ABLE = Capabilities(
    {SEQS: Range(64, 1, 64), TOKENS: Range(2048, 1, 2048), PREFIX_CACHING: Range(1, 0, 1), RESERVE: Range(1, 0, 1)},
    {LONG_PREFILL: "cold here"},
    {SEQS: 64, TOKENS: 2048, PREFIX_CACHING: 1, RESERVE: 1},
)
STARTED: KnobValues = {
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "block_size": 16,
    "enable_prefix_caching": True,
}


@pytest.mark.parametrize(
    ("changed", "targets"),
    [
        ({}, {SEQS: 64, TOKENS: 2048, PREFIX_CACHING: 1}),
        ({"max_num_seqs": 8}, {SEQS: 8, TOKENS: 2048, PREFIX_CACHING: 1}),
        ({"enable_prefix_caching": False}, {SEQS: 64, TOKENS: 2048, PREFIX_CACHING: 0}),
        ({"scheduler_reserve_full_isl": False}, {SEQS: 64, TOKENS: 2048, PREFIX_CACHING: 1, RESERVE: 0}),
        ({"max_num_seqs": 65}, None),  # above the ceiling
        ({"block_size": 32}, None),  # cold
        ({"max_num_batched_tokens": 32}, None),  # fewer than sequences
        ({"long_prefill_token_threshold": 4}, None),  # live elsewhere
        ({"max_num_seqs": True}, None),
        ({"enable_prefix_caching": 1}, None),
        ({"max_num_seqs": None}, None),  # vLLM's default, which is not known
        ({"block_size": None}, None),
    ],
)
def test_what_an_engine_reaches_without_a_restart(
    changed: dict[str, int | bool | None], targets: dict[str, int] | None
) -> None:
    wanted: KnobValues = {name: value for name, value in {**STARTED, **changed}.items() if value is not None}

    assert live_targets(STARTED, wanted, ABLE) == targets
    assert reachable(STARTED, wanted, ABLE) == (targets is not None)
