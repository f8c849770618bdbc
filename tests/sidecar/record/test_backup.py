"""Backups of a journal in use."""

import shutil
import stat
from pathlib import Path

import pytest

from sidecar.record.backup import back_up
from sidecar.record.journal import JOURNAL_FILE, Journal, JournalError


def restored(copy: Path, folder: Path) -> Journal:
    folder.mkdir()
    shutil.copy(copy, folder / JOURNAL_FILE)
    return Journal(folder)


def test_a_backup_has_what_is_only_in_the_write_ahead_log_yet(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.promote(None, "base", {"max_num_seqs": 8})
    target = tmp_path / "copy.sqlite"

    assert back_up(tmp_path, target) == target.stat().st_size
    assert restored(target, tmp_path / "restored").promoted("base") == {"max_num_seqs": 8}
    # A copy of the main file alone lacks it, which is why the command exists.
    assert b"max_num_seqs" not in (tmp_path / JOURNAL_FILE).read_bytes()
    journal.close()


def test_a_backup_is_private_and_replaces_the_one_before(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    target = tmp_path / "copy.sqlite"
    target.write_text("an older one")
    target.chmod(0o644)

    back_up(tmp_path, target)

    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.glob(".copy*")] == []


def test_what_can_not_be_backed_up_is_one_line_and_leaves_the_older_copy(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"there is no journal\.sqlite to back up"):
        back_up(tmp_path, tmp_path / "copy.sqlite")
    (tmp_path / JOURNAL_FILE).write_bytes(b"no journal" * 1000)
    (tmp_path / "copy.sqlite").write_text("an older one")
    with pytest.raises(JournalError, match="not a database"):
        back_up(tmp_path, tmp_path / "copy.sqlite")
    with pytest.raises(JournalError, match="is a folder"):
        back_up(tmp_path, tmp_path)

    assert (tmp_path / "copy.sqlite").read_text() == "an older one"
