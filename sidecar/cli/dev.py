"""The command `sloguard dev`: benchmarks and statistics for developing sloguard, not for operating it."""

import typer

from sidecar.cli import bench, study


def register(app: typer.Typer) -> None:
    """Adds `dev` to ``app``, and the former names `bench` and `study`, which still work but are no longer listed."""
    dev = typer.Typer(no_args_is_help=True)
    dev.callback()(_dev)
    for group, name in ((bench.bench_app, "bench"), (study.study_app, "study")):
        dev.add_typer(group, name=name)
        app.add_typer(group, name=name, hidden=True)
    app.add_typer(dev, name="dev")


def _dev() -> None:
    """Benchmarks and statistics for the development of sloguard."""
