"""`sloguard backup`: a copy of the journal, while the sidecar runs."""

from pathlib import Path
from typing import Annotated

import typer

from sidecar.cli.operator import StateFolder, state_folder
from sidecar.record.backup import back_up


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(backup)


def backup(
    state: StateFolder,
    file: Annotated[Path, typer.Argument(help="Where to write the copy; replaced if it exists.", metavar="FILE")],
) -> None:
    """Copies the journal to FILE, whole, also while the sidecar runs.

    To restore it: stop the sidecar, remove journal.sqlite, journal.sqlite-wal and journal.sqlite-shm from the state
    folder, and copy FILE there as journal.sqlite.

    Example: sloguard backup sloguard-state journal-backup.sqlite
    """
    size = back_up(state_folder(state), file)
    print(f"{file}: {size} bytes")
