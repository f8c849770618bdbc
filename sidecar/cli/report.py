"""`sloguard report` and `sloguard export`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from sidecar.cli.places import ConfigOption, StateFolder, folder_of
from sidecar.config.schema import ConfigError
from sidecar.export import optuna_study, tables
from sidecar.export.bench import LEFT_OUT, result_json
from sidecar.record import run_snapshot
from sidecar.record.atomic_write import write_whole
from sidecar.record.run_snapshot import RunSnapshot

RunNumber = Annotated[int | None, typer.Option("--run", help="The run; default: the newest.", min=1, metavar="N")]


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    app.command()(report)
    app.command()(export)


def report(
    state: StateFolder = None,
    config_file: ConfigOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.", metavar="FILE")] = Path(
        "report.html"
    ),
    run: RunNumber = None,
) -> None:
    """Write a self-contained HTML report of a run: the decision, its evidence, every trial.

    Example: sloguard report sloguard-state -o report.html
    """
    from sidecar.report.page import report_page
    from sidecar.report.view_model import report_view

    view = report_view(run_snapshot.read_run(folder_of(state, config_file), run))
    write_whole(output, report_page(view))
    print(f"{output}: run {view.run}: {view.verdict.headline}")


def export(  # noqa: PLR0917 - the options of a command
    state: StateFolder = None,
    config_file: ConfigOption = None,
    optuna: Annotated[
        str, typer.Option(help="An Optuna storage, e.g. for optuna-dashboard: sqlite:///FILE.", metavar="URL")
    ] = "",
    csv: Annotated[Path | None, typer.Option(help="CSV with one row per trial.", metavar="FILE")] = None,
    jsonl: Annotated[Path | None, typer.Option(help="JSON lines, one object per trial.", metavar="FILE")] = None,
    bench: Annotated[
        Path | None,
        typer.Option(help="One file per trial, in the format of vllm bench serve --save-result.", metavar="FOLDER"),
    ] = None,
    run: Annotated[int | None, typer.Option("--run", help="The run; default: all.", min=1, metavar="N")] = None,
) -> None:
    """Export trials to other tools.

    Example: sloguard export sloguard-state --optuna sqlite:///trials.db --csv trials.csv
    """
    if not (optuna or csv or jsonl or bench):
        raise ConfigError("export: one of --optuna, --csv, --jsonl, --bench is needed")
    if optuna and "://" not in optuna:
        raise ConfigError(f"--optuna {optuna!r}: an SQLAlchemy URL such as sqlite:///trials.db is needed")
    folder = folder_of(state, config_file)
    runs = run_snapshot.read_all(folder) if run is None else [run_snapshot.read_run(folder, run)]
    for path, text in ((csv, tables.csv_text), (jsonl, tables.jsonl_text)):
        if path is not None:
            write_whole(path, text(runs))
            print(f"{path}: {sum(len(r.trials) for r in runs)} trials")
    if bench is not None:
        _bench(runs, bench)
    if optuna:
        console = Console(stderr=True)
        for one in runs:
            name = f"sloguard run {one.run.id}"
            added = optuna_study.add(
                one, optuna, name, lambda new: track(new, "exporting to Optuna", console=console) if new else new
            )
            print(f"study {name!r}: {added} trials added")


def _bench(runs: list[RunSnapshot], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for one in runs:
        for trial in one.trials:
            content = result_json(one, trial)
            if content is not None:
                path = folder / f"run-{trial.run}-trial-{trial.number:04}.json"
                write_whole(path, json.dumps(content, allow_nan=False))
                written += 1
    trials = sum(len(one.trials) for one in runs)
    print(f"{folder}: {written} of {trials} trials, those with a complete load; not in these files: {LEFT_OUT}")
