"""Atomic file writes, their modes, symlinks and temporary files."""

import os
import stat
import threading
from pathlib import Path

import pytest

from sidecar.record.atomic_write import write_whole


def test_what_lies_beside_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "report.new").write_text("the operator's")
    write_whole(tmp_path / "report.html", "the page")

    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "report.html": "the page",
        "report.new": "the operator's",
    }


def test_nothing_is_left_of_what_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "report.html").write_text("the old page")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/report\.html'"):
        write_whole(tmp_path / "report.html", "the page")

    assert [path.read_text() for path in tmp_path.iterdir()] == ["the old page"]


@pytest.mark.parametrize("name", ["", ".", "..", "/", "folder"])
def test_a_folder_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(Path(name), "the page")

    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_a_pipe_stays_one(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_whole(pipe, "the page")
    reader.join(60)

    assert (read, pipe.is_fifo()) == (["the page"], True)


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    for text in ("one", "another"):
        write_whole(tmp_path / "link", text)
        assert (tmp_path / "target").read_text() == text
    assert (tmp_path / "link").is_symlink()


def test_a_secret_is_never_open_to_others(tmp_path: Path) -> None:
    write_whole(tmp_path / "token", "secret", 0o600)

    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
