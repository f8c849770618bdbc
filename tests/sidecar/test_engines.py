"""What the sidecar gives the engines that it starts."""

from pathlib import Path

import pytest
from engine_bench import bench, write_config

from sidecar.engine.engine import any_free_port, port_free

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
    ports = {any_free_port() for _ in range(50)}
    assert len(ports) > 1
    assert all(1024 <= port < int(first) and port_free("127.0.0.1", port) for port in ports)
