"""`sloguard trials` and `sloguard history`: tables on a terminal of 80 columns, plain lines in a pipe."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from report_cases import whole
from typer.testing import CliRunner

from sidecar.cli.main import app
from sidecar.config.schema import load_config
from sidecar.record.action_queue import ActionKind, ActionOutcome, ActionQueue, Door, Sender
from sidecar.record.events import EventKind, Operations, WindowOutcome
from sidecar.record.journal import Journal


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A promotion that was rolled back, two windows and an operator's action."""
    state = whole(tmp_path / "run", 14)
    config = load_config(state.parent / "sloguard.yaml")
    journal = Journal(state)
    operations = Operations(journal, config.base_digest())
    operations.record(EventKind.WINDOW_ENDED, outcome=WindowOutcome.PROMOTED, reason="better", decision="promoted")
    operations.record(EventKind.WINDOW_ENDED, outcome=WindowOutcome.FAILED, reason="[Errno 28] no space left")
    operations.roll_back(1, "5 of 200 requests failed")
    ActionQueue(journal).settle(ActionKind.ROLLBACK, Sender(Door.CLI, "ada"), ActionOutcome.DONE, "rolled back")
    journal.close()
    return state.parent / "sloguard.yaml"


def on_terminal(*words: object, columns: int) -> str:
    """What a command prints on a terminal, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "sidecar", *map(str, words)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as asked:
        os.close(theirs)
        output = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 4096):
                output += piece
    os.close(ours)
    assert asked.returncode == 0
    return output.decode()


def plain(text: str) -> list[str]:
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("command", ["trials", "history", "status"])
def test_a_table_fits_the_terminal_and_is_coloured_by_verdict(command: str, columns: int, config_file: Path) -> None:
    output = on_terminal(command, config_file, columns=columns)
    assert max(map(len, plain(output))) <= columns
    assert "\x1b[32m" in output or "\x1b[33m" in output  # green or yellow


def test_history_in_a_pipe_is_one_line_per_thing(config_file: Path) -> None:
    done = CliRunner().invoke(app, ["history", "-c", str(config_file)])
    assert done.exit_code == 0, done.output
    whats = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+  ", "", line) for line in done.stdout.splitlines()]
    assert [what.split(": ")[:2] for what in whats] == [
        ["promotion 1", "rolled back"],
        ["window", "promoted"],
        ["window", "failed"],
        ["rollback", "of promotion 1"],
        ["rollback", "done"],
    ]
    assert whats[2] == "window: failed: [Errno 28] no space left"
    assert whats[3].endswith("5 of 200 requests failed; its configuration is quarantined")
    assert whats[4] == "rollback: done: rolled back by ada (cli)"


def test_trials_in_a_pipe_are_one_line_each(config_file: Path) -> None:
    done = CliRunner().invoke(app, ["trials", str(config_file)])
    assert done.exit_code == 0, done.output
    assert [line.split()[:2] for line in done.stdout.splitlines()][:2] == [["trial", "1"], ["trial", "2"]]
