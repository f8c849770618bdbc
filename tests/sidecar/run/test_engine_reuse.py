"""How the engine of a trial is started, with engines of the fake vLLM that count as forked."""

from pathlib import Path

import pytest
from engine_bench import bench
from fake_service import fake_config
from fake_vllm import OUT_OF_MEMORY
from sidecar_cases import planned

from sidecar.engine.engine import Engine, Launch
from sidecar.engine.live_knobs import LiveHub
from sidecar.record.trial import Role, StartKind
from sidecar.run.engine_manager import EngineManager
from sidecar.run.engine_reuse import NotStartedError, TrialEngines


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[StartKind]:
    """The kind of each start, in order; a forked one is an ordinary one by another name."""
    kinds: list[StartKind] = []
    begin, refuse = EngineManager.begin, EngineManager.fork_no_more
    disabled: list[str] = []

    def named(self: EngineManager, launch: Launch, role: str, *, fork: bool) -> tuple[Engine, StartKind]:
        kinds.append(StartKind.FORKED if fork and not disabled else StartKind.ORDINARY)
        return begin(self, launch, role, fork=False)[0], kinds[-1]

    def remembered(self: EngineManager, why: str) -> None:
        disabled.append(why)
        refuse(self, why)

    monkeypatch.setattr(EngineManager, "begin", named)
    monkeypatch.setattr(EngineManager, "fork_no_more", remembered)
    return kinds


def start(folder: Path, role: Role, seqs: int, **engine: bool) -> StartKind:
    """Starts one engine for a trial of ``role``, ends it, and returns how it was started."""
    with bench(fake_config(folder, engine=engine)) as sidecar:
        engines = TrialEngines(sidecar.config, LiveHub(), sidecar.engines, print)
        plan = planned(role, max_num_seqs=seqs)

        def launch(args: object) -> Launch:
            return sidecar.engines.trial_launch({**sidecar.config.engine.args, "max_num_seqs": seqs}, repair=False)

        ready = engines.get(plan, launch, lambda: False, exact=True)
        sidecar.engines.end(ready.engine, drain=False)
        return ready.start


@pytest.mark.parametrize("role", [Role.REFERENCE, Role.VALIDATION])
@pytest.mark.parametrize(("serving", "kind"), [(True, StartKind.FORKED), (False, StartKind.ORDINARY)])
def test_a_validation_starts_engines_the_way_the_service_does(
    tmp_path: Path, starts: list[StartKind], role: Role, serving: bool, kind: StartKind
) -> None:
    assert start(tmp_path, role, 4, forked_trials=True, forked_serving=serving) is kind
    assert starts == [kind]


def test_a_crash_of_a_forked_engine_counts_in_a_validation_once_an_ordinary_start_crashed_too(
    tmp_path: Path, starts: list[StartKind]
) -> None:
    with pytest.raises(NotStartedError) as failed:
        start(tmp_path, Role.VALIDATION, OUT_OF_MEMORY, forked_serving=True)

    assert starts == [StartKind.FORKED, StartKind.ORDINARY]
    assert failed.value.start is StartKind.ORDINARY


def test_a_crash_of_a_forked_engine_counts_at_once_in_the_search(tmp_path: Path, starts: list[StartKind]) -> None:
    with pytest.raises(NotStartedError):
        start(tmp_path, Role.SEARCH, OUT_OF_MEMORY, forked_trials=True)

    assert starts == [StartKind.FORKED]
