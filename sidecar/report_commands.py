"""`sloguard report` and `sloguard export`."""

from pathlib import Path
from typing import Annotated

import typer

from sidecar import recorded
from sidecar.files import write_whole
from sidecar.journal import FILE_NAME
from sidecar.operator_commands import StateFolder, state_folder

RunNumber = Annotated[int | None, typer.Option("--run", help="The run; the newest unless given.", min=1, metavar="N")]


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    app.command()(report)


def report(
    state: StateFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.", metavar="FILE")] = Path(
        "report.html"
    ),
    run: RunNumber = None,
) -> None:
    """Tells of one run on one HTML page that needs no network: the decision, its evidence, every trial.

    Example: sloguard report sloguard-state -o report.html
    """
    from sidecar.report.page import page
    from sidecar.report.story import story

    told = story(recorded.read(_folder(state), run))
    write_whole(output, page(told))
    print(f"{output}: run {told.run}: {told.verdict.headline}")


def _folder(path: Path) -> Path:
    """The folder that ``path`` is, that its journal is in, or that the configuration file there names."""
    return path.parent if path.name == FILE_NAME else state_folder(path)
