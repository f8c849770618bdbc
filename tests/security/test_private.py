"""The state folder and its socket are private to one user."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from fake_service import fake_config, serving, sloguard

from sidecar.config.schema import load_config
from sidecar.record import lock

_NOBODY = 65534
HOOK = ["sh", "-c", 'echo > "$HOOKED"']
_CONNECT = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
try: socket.socket(socket.AF_UNIX).connect(sys.argv[1])
except PermissionError: sys.exit(13)
"""


def test_what_a_serving_sidecar_leaves_in_the_folder_is_out_of_reach_for_others(tmp_path: Path) -> None:
    config_file = fake_config(tmp_path)
    with serving(config_file):
        config = load_config(config_file)
        assert stat.S_IMODE(config.state.stat().st_mode) == 0o700
        assert stat.S_ISSOCK(config.socket.stat().st_mode)
        assert stat.S_IMODE(config.socket.stat().st_mode) == 0o600
        assert stat.S_IMODE((config.state / "logs").stat().st_mode) == 0o700
        assert open_to_others(config.state) == []


def open_to_others(state: Path) -> list[str]:
    paths = [path for path in state.rglob("*") if not path.is_symlink()]
    return [str(path) for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077]


def test_every_file_is_private_after_a_window_and_those_of_earlier_versions_too(tmp_path: Path) -> None:
    config_file = fake_config(tmp_path, window={"duration": "10m", "notice": "0s", "hooks": {"before_drain": HOOK}})
    state = load_config(config_file).state
    state.mkdir(mode=0o700)
    for name in ("learned.json", "output.txt"):
        (state / name).write_text("{}")
        (state / name).chmod(0o644)
    hooked = tmp_path / "hooked"
    umask = os.umask(0o022)
    try:
        with serving(config_file, HOOKED=str(hooked)):
            assert sloguard("retune", "--now", "--wait", "-c", config_file).returncode == 0
            assert open_to_others(state) == []
    finally:
        os.umask(umask)
    assert len(list(state.iterdir())) > 8
    # Children keep the umask that the sidecar was started with.
    assert stat.S_IMODE(hooked.stat().st_mode) == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user to try it")
@pytest.mark.parametrize(("uid", "code"), [(0, 0), (_NOBODY, 13)])
def test_the_kernel_lets_no_other_user_connect(uid: int, code: int) -> None:
    # In a folder that everybody may enter: the socket's own mode must be enough.
    with socket.socket(socket.AF_UNIX) as server:
        name = Path(f"/tmp/sloguard-test-{os.getpid()}.sock")  # noqa: S108 - pytest's own folders are closed to others
        umask = os.umask(0o177)
        try:
            server.bind(str(name))
            server.listen()
            tried = subprocess.run([sys.executable, "-c", _CONNECT, name, str(uid)], check=False, timeout=300)
        finally:
            os.umask(umask)
            name.unlink()
    assert tried.returncode == code


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_is_open_to_others_is_refused_before_anything_is_written(tmp_path: Path, mode: int) -> None:
    config_file = fake_config(tmp_path)
    state = load_config(config_file).state
    state.mkdir()
    state.chmod(mode)

    for command in ("serve", "tune"):
        refused = sloguard(command, "-c", config_file)
        assert refused.returncode == 2
        assert refused.stderr == f"sloguard: {state}: is open to others (mode {mode:o}); chmod 700 it\n"
    assert list(state.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    os.chown(folder, _NOBODY, _NOBODY)

    with pytest.raises(lock.LockedError, match="belongs to user 65534"), lock.held(folder):
        pass
