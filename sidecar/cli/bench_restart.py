"""The command `sloguard dev bench restart`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sidecar.bench.engine_starts import as_dict, as_text, measure_starts
from sidecar.cli.rendering import print_json
from sidecar.config.schema import load_config


def restart(
    config_file: Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="The engine to start.")],
    starts: Annotated[int, typer.Option(min=1, help="Starts of each kind.")] = 5,
    in_a_row: Annotated[int, typer.Option(min=0, help="Forked starts to check for leaks.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Time ordinary and forked starts of real vLLM up to the first token.

    Example: sloguard dev bench restart -c deploy/demo/sloguard.yaml
    """

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    measured = measure_starts(load_config(config_file), starts, in_a_row, say)
    if as_json:
        print_json(as_dict(measured))
    else:
        print(as_text(measured))
