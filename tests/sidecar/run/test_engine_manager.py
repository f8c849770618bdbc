"""What the sidecar passes to the engines that it starts."""

import sys
import time
from pathlib import Path

import pytest
from engine_bench import bench, write_config

from sidecar.engine.engine import Engine, Launch
from vllm_sloguard.agent.ports import any_free_port, first_ephemeral_port, port_free
from vllm_sloguard.agent.process_group import ProcessGroup
from vllm_sloguard.crash import Category

TRITON = "TRITON_CACHE_DIR"


def kernels(folder: Path, **engine: object) -> str | None:
    with bench(write_config(folder, engine=engine)) as sidecar:
        return dict(sidecar.engines.trial_launch({}, repair=False).env).get(TRITON)


def test_engines_keep_their_kernels_in_the_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRITON, raising=False)
    assert kernels(tmp_path) == str(tmp_path / "state" / "kernels")


def test_kernels_are_left_to_vllm_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRITON, raising=False)
    assert kernels(tmp_path, keep_kernels=False) is None


def test_the_operators_own_folder_of_kernels_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels(tmp_path, env={TRITON: "/mine"}) == "/mine"
    monkeypatch.setenv(TRITON, "/theirs")
    assert kernels(tmp_path) is None


def test_a_trials_port_is_none_that_the_system_gives_away() -> None:
    first, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert first_ephemeral_port() == int(first)
    ports = {any_free_port() for _ in range(50)}
    assert len(ports) > 1
    assert all(1024 <= port < int(first) and port_free("127.0.0.1", port) for port in ports)


@pytest.mark.parametrize("below", [1, 1024])
def test_where_the_system_gives_all_ports_away_a_trial_has_one_of_them(below: int) -> None:
    assert port_free("127.0.0.1", any_free_port(below=below))


# Writes its location to standard error, which is its log.
STUCK = """
import sys, time
from vllm_sloguard.hooks.stack_dump import show_when_asked

def stuck_here():
    print("stuck", file=sys.stderr, flush=True)
    time.sleep(600)

if sys.argv[1] == "asked":
    show_when_asked()
stuck_here()
"""


@pytest.mark.parametrize("how", ["asked", "never asked"])
def test_a_hung_engine_logs_its_stack(tmp_path: Path, how: str) -> None:
    log = tmp_path / "engine.log"
    launch = Launch("stuck", sys.executable, "model", {}, "127.0.0.1", any_free_port(), {}, log)
    group = ProcessGroup.start([sys.executable, "-c", STUCK, how], "stuck", log, launch.environment, tmp_path)
    deadline = time.monotonic() + 60
    while not log.exists() or "stuck" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    crash = Engine(launch, group).crashed("serving", timed_out=True).crash
    assert group.members() == []
    assert (crash.category, crash.evidence) == (Category.TIMEOUT, "the deadline passed while serving; last line: stuck")
    assert ("in stuck_here" in log.read_text()) == (how == "asked")
