"""Runs `sloguard` commands by forking a process that has imported it, which saves a second of CPU time for each."""

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from zygote import Zygote

_LONGEST_S = 300.0
_zygotes: list[Zygote] = []


def run_forked(argv: Sequence[str], environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Runs `sloguard ARGV` to completion, in this folder and with ``environment`` beside this process's own."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        code = _zygote().start(argv, output, {**os.environ, **environment}, errors).wait(_LONGEST_S)
        assert code is not None, f"sloguard {' '.join(argv)} takes longer than {_LONGEST_S:g} s"
        return subprocess.CompletedProcess(["sloguard", *argv], code, output.read_text(), errors.read_text())


def _zygote() -> Zygote:
    """The one of these tests; it ends with the thread that started it."""
    if not _zygotes or not _zygotes[-1].alive:
        _zygotes.append(Zygote())
    return _zygotes[-1]
