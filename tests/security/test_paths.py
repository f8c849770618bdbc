"""The sidecar writes only in its state folder, and follows no recorded path out of it."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from engine_bench import bench
from fake_service import fake_config, serving, sloguard

from sidecar.config.schema import load_config
from sidecar.engine.engine import Launch
from sidecar.record.journal import EngineRecord
from sidecar.run.engine_manager import known
from vllm_sloguard.agent.process_identity import Identity


def files(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*") if path.is_file()}


def test_a_whole_window_writes_below_the_state_folder_alone(tmp_path: Path) -> None:
    config_file = fake_config(tmp_path)
    state = load_config(config_file).state
    model = Path(load_config(config_file).model)
    before = files(model)
    with serving(config_file):
        assert sloguard("retune", "--now", "--wait", "-c", config_file).returncode == 0
    outside = {name for name in files(tmp_path) if not Path(name).is_relative_to(state)}
    assert outside == {str(config_file), str(config_file.with_name("said.txt"))}
    assert files(model) == before
    assert {path.name for path in state.iterdir()} >= {"journal.sqlite", "logs", "promoted.yaml"}


@pytest.mark.parametrize("log", ["{tmp}/passwd", "{state}/logs/../../passwd", "{state}/logs/link.log", "passwd"])
def test_an_engine_whose_log_lies_elsewhere_is_not_taken_over(tmp_path: Path, log: str) -> None:
    with bench(fake_config(tmp_path)) as parts:
        (tmp_path / "passwd").write_text("root")
        (parts.config.state / "logs" / "link.log").symlink_to(tmp_path / "passwd")
        own = parts.engines.serving_launch({})
        me = psutil.Process()
        identity = Identity(me.pid, me.create_time(), own.engine_id)

        def taken(launch: Launch) -> bool:
            return parts.engines.adopt(EngineRecord(identity, "serving", known(launch)), {}) is not None

        assert taken(own)
        assert not taken(replace(own, log=Path(log.format(tmp=tmp_path, state=parts.config.state))))
        assert (tmp_path / "passwd").read_text() == "root"
