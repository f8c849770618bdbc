"""`sloguard backup`: a copy of the journal, while the sidecar runs."""

from pathlib import Path
from typing import Annotated

import typer

from sidecar.cli.places import RequiredState, folder_of
from sidecar.record.backup import back_up


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(backup)


def backup(
    state: RequiredState,
    file: Annotated[Path, typer.Argument(help="Where to write the copy; replaced if it exists.", metavar="FILE")],
) -> None:
    """Back up the journal to FILE, also while the sidecar is running.

    To restore it, stop the sidecar, remove journal.sqlite, journal.sqlite-wal and journal.sqlite-shm from the state
    folder, and copy FILE there as journal.sqlite.

    Example: sloguard backup sloguard-state journal-backup.sqlite
    """
    size = back_up(folder_of(state, None), file)
    print(f"{file}: {size} bytes")
